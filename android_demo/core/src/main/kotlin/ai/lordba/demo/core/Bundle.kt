package ai.lordba.demo.core

import com.google.gson.JsonObject
import java.io.File

/** A bundle that was found complete and undamaged; what `Bundle` of lordba/runtime/bundle.py is. */
data class Bundle(
    val folder: File,
    val manifest: Manifest,
) {
    val program: File get() = File(folder, manifest.program)

    /** The runtime's file of an adapter; null is the base alone, which may need a file too. */
    fun adapterFile(name: String?): File? {
        val path = if (name == null) manifest.noAdapter else adapter(name).file
        return path?.let { File(folder, it) }
    }

    /** What the manifest says of an adapter. */
    fun adapter(name: String): BundleAdapter =
        manifest.adapters.find { it.name == name } ?: throw LordbaError(
            "$folder: holds no adapter '$name'; it holds " +
                (manifest.adapters.map { it.name } + "none").joinToString(),
        )
}

/** Whether an adapter may be called so: it does as a file's name, and does not stand for the base alone. */
fun isAdapterName(name: String): Boolean =
    name != "none" && name.isNotEmpty() && name[0].isLetterOrDigit() && name.all { it.isLetterOrDigit() || it in "-_." }

/**
 * Reads a bundle and checks every file of it before anything runs.
 *
 * [onBytes] hears how many bytes have been checked, of how many. Throws [LordbaError].
 */
fun readBundle(
    folder: File,
    onBytes: (Long, Long) -> Unit = { _, _ -> },
): Bundle {
    val bundle = Bundle(folder, readManifest(folder))
    val total = bundle.manifest.files.sumOf { it.bytes }
    var checked = 0L
    for (file in bundle.manifest.files) {
        checkFile(folder, file)
        checked += file.bytes
        onBytes(checked, total)
    }
    return bundle
}

/** Reads and checks manifest.json alone. */
fun readManifest(folder: File): Manifest {
    val file = File(folder, MANIFEST_NAME)
    if (!file.isFile) {
        throw LordbaError("$file: not found; a bundle is made by: python -m lordba.export --output ${folder.name}")
    }
    val record: JsonObject
    val version: String
    try {
        record = parseJsonObject(file)
        version = record.need("format_version").toString()
    } catch (error: JsonShapeError) {
        throw LordbaError("$file: is not a readable manifest (${error.message}); export the bundle again", error)
    }
    if (version != "$FORMAT_VERSION") {
        throw LordbaError(
            "$file: format_version $version is not known here (this app reads $FORMAT_VERSION); " +
                "install a newer app or export the bundle again",
        )
    }
    val manifest =
        try {
            manifestOf(record)
        } catch (error: JsonShapeError) {
            throw LordbaError("$file: lacks or misspells a key (${error.message}); export the bundle again", error)
        }
    checkListed(manifest, file)
    return manifest
}

private fun checkListed(
    manifest: Manifest,
    file: File,
) {
    val used = listOf(manifest.program, manifest.tokenizer, manifest.noAdapter) + manifest.adapters.map { it.file }
    val listed = manifest.files.flatMap { generateSequence(File(it.path)) { path -> path.parentFile } }.map { it.path }
    val unlisted = used.filterNotNull().toSet() - listed.toSet()
    if (unlisted.isNotEmpty()) {
        throw LordbaError("$file: uses ${unlisted.min()}, which its files do not list; export the bundle again")
    }
}

private fun checkFile(
    folder: File,
    file: BundleFile,
) {
    val path = File(folder, file.path)
    if (!path.canonicalPath.startsWith(folder.canonicalPath + File.separator)) {
        throw LordbaError("${File(folder, MANIFEST_NAME)}: names a file outside the bundle: ${file.path}")
    }
    if (!path.isFile) {
        throw LordbaError("$path: is missing although the manifest lists it; copy or export the bundle again")
    }
    if (path.length() != file.bytes) {
        throw LordbaError(
            "$path: expected ${file.bytes} bytes, found ${path.length()}; copy or export the bundle again",
        )
    }
    if (sha256Of(path) != file.sha256) {
        throw LordbaError("$path: its contents do not match the manifest's sha256; copy or export the bundle again")
    }
}
