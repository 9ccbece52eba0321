package ai.lordba.demo.core

import java.io.File

/** A folder that may be a bundle, as the Models screen lists it; its files are not checked yet. */
data class BundleListing(
    val folder: File,
    val manifest: Manifest?,
    /** Why it cannot be used, or null. */
    val problem: String?,
) {
    /** What identifies it while the app lives and after. */
    val id: String get() = folder.path

    /** Bytes of all files that the manifest lists. */
    val bytes: Long get() = manifest?.files.orEmpty().sumOf { it.bytes }
}

/** The bundles in the app's own storage and in the folder that adb can write to. */
class BundleStore(
    private val roots: List<File>,
) {
    /** Every folder with a manifest, by name; reads the manifests alone. */
    fun list(): List<BundleListing> =
        roots
            .flatMap { it.listFiles().orEmpty().toList() }
            .filter { File(it, MANIFEST_NAME).isFile && !it.name.startsWith(".") }
            .sortedBy { it.name }
            .map(::listing)

    /** Deletes a bundle that [list] named. Renaming it first leaves no half of it behind. */
    fun delete(listing: BundleListing) {
        val folder = listing.folder
        require(folder.parentFile in roots) { "$folder is none of ours" }
        val doomed = File(folder.parentFile, ".deleted.${folder.name}.${System.nanoTime()}")
        if (!folder.renameTo(doomed)) throw LordbaError("$folder: cannot be deleted; is it in use?")
        doomed.deleteRecursively()
    }

    private fun listing(folder: File): BundleListing =
        try {
            val manifest = readManifest(folder)
            BundleListing(folder, manifest, problemOf(manifest))
        } catch (error: LordbaError) {
            BundleListing(folder, null, error.message)
        }

    private fun problemOf(manifest: Manifest): String? {
        val (target, mode) = manifest.target to manifest.adapterMode
        return when {
            target == "onnx" && mode == "onnx_adapter" -> null
            target == "executorch" && mode in listOf("input", "ptd") -> null
            else -> "a bundle for $target with adapters as $mode does not run on Android; export it with --android"
        }
    }
}
