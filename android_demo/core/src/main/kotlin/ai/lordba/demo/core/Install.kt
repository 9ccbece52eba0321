package ai.lordba.demo.core

import java.io.File

/** Writes an adapter's file as the bundle's program reads it, or throws [LordbaError]. */
typealias WriteAdapter = (Bundle, Adapter, File) -> Unit

/**
 * Adds an adapter to a bundle, or replaces the one of this name; returns the bundle as it is then.
 *
 * What counts is the manifest: renaming it into place is the one step in which an adapter appears. Throws
 * [LordbaError], and changes nothing, where the adapter is not one for this base and program.
 */
fun install(
    bundle: Bundle,
    name: String,
    adapter: Adapter,
    write: WriteAdapter = ::writeAdapterFile,
): Bundle {
    checkFits(bundle, name, adapter)
    val path = unusedFile(bundle, name)
    val file = File(bundle.folder, path)
    write(bundle, adapter, file)
    val entry =
        BundleAdapter(
            name,
            path,
            adapter.r,
            adapter.scaleCode.id,
            adapter.modules.size,
            adapter.bytes,
            adapter.fp16LoraBytes,
            file.length(),
        )
    return try {
        changed(bundle, name, entry, BundleFile(path, entry.fileBytes, sha256Of(file)))
    } catch (error: LordbaError) {
        file.delete()
        throw error
    }
}

/** Takes an adapter out of a bundle and deletes its file; returns the bundle as it is then. */
fun remove(
    bundle: Bundle,
    name: String,
): Bundle {
    bundle.adapter(name)
    return changed(bundle, name, null, null)
}

private fun changed(
    bundle: Bundle,
    name: String,
    entry: BundleAdapter?,
    file: BundleFile?,
): Bundle {
    val (old, adapters) = bundle.manifest.adapters.partition { it.name == name }
    val unused = old.map { it.file } - adapters.map { it.file }.toSet()
    val files = bundle.manifest.files.filter { it.path !in unused }
    val manifest = bundle.manifest.with(adapters + listOfNotNull(entry), files + listOfNotNull(file))
    newFile(File(bundle.folder, MANIFEST_NAME)) { it.write((manifest.record.toText(2) + "\n").toByteArray()) }
    unused.forEach { File(bundle.folder, it).delete() } // nothing lists it any more: it only takes room
    return bundle.copy(manifest = manifest)
}

private fun checkFits(
    bundle: Bundle,
    name: String,
    adapter: Adapter,
) {
    if (!isAdapterName(name)) {
        throw LordbaError("the adapter's name '$name' is no usable file name; take letters, digits, - _ and .")
    }
    val expected = bundle.manifest.fingerprint
    if (adapter.baseFingerprint != null && adapter.baseFingerprint != expected) {
        throw LordbaError(
            "adapter $name: was made for the base ${adapter.baseName} with fingerprint ${adapter.baseFingerprint}, " +
                "but ${bundle.folder} holds ${bundle.manifest.baseName} with $expected; " +
                "install it into a bundle of its own base",
        )
    }
    val unknown =
        adapter.modules.keys -
            bundle.manifest.modules
                .filterNotNull()
                .toSet()
    if (unknown.isNotEmpty()) {
        throw LordbaError(
            "adapter $name: adapts ${unknown.min()}, for which the program of ${bundle.folder} has no place; " +
                "export a bundle with this adapter",
        )
    }
}

private fun unusedFile(
    bundle: Bundle,
    name: String,
): String = generateSequence(1) { it + 1 }.map { "adapters/$name.$it" }.first { !File(bundle.folder, it).exists() }
