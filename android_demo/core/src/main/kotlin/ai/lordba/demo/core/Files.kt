package ai.lordba.demo.core

import java.io.File
import java.io.FileOutputStream
import java.io.IOException
import java.io.OutputStream
import java.security.MessageDigest

/** Lets [write] fill a temporary file beside [file], which takes its place once it is complete and on the disk. */
fun newFile(
    file: File,
    write: (OutputStream) -> Unit,
) {
    explained(file) {
        val folder = file.absoluteFile.parentFile
        if (!folder.isDirectory && !folder.mkdirs()) throw IOException("$folder cannot be made")
        val temporary = File.createTempFile(".${file.name}.", "", folder)
        try {
            FileOutputStream(temporary).use {
                write(it)
                it.fd.sync()
            }
            if (!temporary.renameTo(file)) throw IOException("$temporary cannot be renamed")
        } finally {
            temporary.delete()
        }
    }
}

/** Lets [write] fill a temporary folder beside [folder], which must be free, and gives it that name at the end. */
fun newFolder(
    folder: File,
    write: (File) -> Unit,
) {
    if (folder.exists()) throw LordbaError("$folder: exists already; name another folder")
    explained(folder) {
        val parent = folder.absoluteFile.parentFile
        val temporary = File(parent, ".${folder.name}.${System.nanoTime()}")
        if (!temporary.mkdirs()) throw IOException("$temporary cannot be made")
        try {
            write(temporary)
            if (!temporary.renameTo(folder)) throw IOException("$temporary cannot be renamed")
        } finally {
            temporary.deleteRecursively()
        }
    }
}

/** Hex digest of a file. */
fun sha256Of(file: File): String {
    val digest = MessageDigest.getInstance("SHA-256")
    val buffer = ByteArray(1 shl 16)
    explainedRead(file) {
        file.inputStream().use { input ->
            while (true) {
                val count = input.read(buffer)
                if (count < 0) break
                digest.update(buffer, 0, count)
            }
        }
    }
    return digest.digest().joinToString("") { "%02x".format(it) }
}

/** Runs [read]; what the disk refuses becomes a [LordbaError] that names the file. */
fun <T> explainedRead(
    file: File,
    read: () -> T,
): T =
    try {
        read()
    } catch (error: IOException) {
        throw LordbaError("$file: cannot be read (${error.message}); copy it anew", error)
    }

private fun explained(
    file: File,
    write: () -> Unit,
) = try {
    write()
} catch (error: IOException) {
    throw LordbaError("$file: cannot be written (${error.message}); free some storage and try again", error)
}
