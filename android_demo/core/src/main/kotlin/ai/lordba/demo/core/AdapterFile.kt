package ai.lordba.demo.core

import java.io.File

/** Writes an adapter as the bundle's program reads it: see [WriteAdapter]. */
fun writeAdapterFile(
    bundle: Bundle,
    adapter: Adapter,
    file: File,
) {
    val bytes =
        when (bundle.manifest.target to bundle.manifest.adapterMode) {
            "executorch" to "input", "coreml" to "inputs" -> blobFor(bundle, adapter, null)

            "executorch" to "ptd" -> dataFile(bundle, adapter)

            "onnx" to "onnx_adapter" -> onnxFile(bundle, adapter)

            else -> throw LordbaError(
                "${bundle.folder}: its adapters are ${bundle.manifest.adapterMode}, parts of its program, which only " +
                    "an export can change; export it with the adapters that you want",
            )
        }
    newFile(file) { it.write(bytes) }
}

/** The scale code that an ONNX program takes, which its bundle says for this app alone. */
private fun programCode(bundle: Bundle): ScaleCode =
    try {
        val code =
            bundle.manifest.record
                .nested("android")
                .string("adapter_scale_code")
        ScaleCode.of(code) ?: throw JsonShapeError("'adapter_scale_code': $code")
    } catch (error: JsonShapeError) {
        throw LordbaError(
            "${bundle.folder}: does not say which scales its program takes (${error.message}); its adapters can be " +
                "swapped, others can be added if it is exported with --android",
            error,
        )
    }

/** The data files of a program differ in the blob alone, which ends them and has one size. */
private fun dataFile(
    bundle: Bundle,
    adapter: Adapter,
): ByteArray {
    val template =
        bundle.adapterFile(null)
            ?: throw LordbaError("${bundle.folder}: lists no file for \"no adapter\"; export the bundle again")
    val raw = explainedRead(template) { template.readBytes() }
    val start = blobStart(raw, template)
    return raw.copyOf(start) + blobFor(bundle, adapter, raw.size - start)
}

/** An ONNX program knows no rank 0 and one scale code. */
private fun onnxFile(
    bundle: Bundle,
    adapter: Adapter,
): ByteArray {
    val code = programCode(bundle)
    val paths = bundle.manifest.modules.filterNotNull()
    val sizes = knownSizes(bundle)
    val modules =
        paths.mapIndexed { i, path ->
            val module = adapter.modules[path]?.withCode(code)
            module ?: sizes[i]?.let { (dIn, dOut) -> noAdapter(dIn, dOut, code) }
                ?: throw LordbaError("the adapter lacks $path, whose size no adapter of ${bundle.folder} tells")
        }
    val blob = makeBlob(modules)
    checkSizes(bundle, blobSizes(blob), sizes)
    return onnxAdapterBytes(blob, bundle.manifest.fingerprint, paths)
}

private fun blobFor(
    bundle: Bundle,
    adapter: Adapter,
    size: Int?,
): ByteArray {
    val blob = makeBlob(bundle.manifest.modules.map { path -> path?.let { adapter.modules[it] } }, size)
    checkSizes(bundle, blobSizes(blob), knownSizes(bundle))
    return blob
}

/** The sizes of the program's modules as the adapters that came with it tell them, null where none does. */
private fun knownSizes(bundle: Bundle): List<Pair<Int, Int>?> {
    val known = bundle.manifest.adapters.map { blobSizes(blobOf(File(bundle.folder, it.file))) }
    return List(bundle.manifest.modules.size) { i -> known.firstNotNullOfOrNull { it.getOrNull(i) } }
}

/** Refuses an adapter whose modules have other sizes than those of an adapter that came with the program. */
private fun checkSizes(
    bundle: Bundle,
    found: List<Pair<Int, Int>?>,
    known: List<Pair<Int, Int>?>,
) {
    for ((i, module) in bundle.manifest.modules.withIndex()) {
        val (size, expected) = found[i] to known[i]
        if (size != null && expected != null && size != expected) {
            throw LordbaError(
                "the adapter maps ${size.first} to ${size.second} channels in $module, the program " +
                    "${expected.first} to ${expected.second}; it is for another model",
            )
        }
    }
}

/** The blob in a bundle's adapter file: the file itself, or its end. */
fun blobOf(file: File): ByteArray {
    val raw = explainedRead(file) { file.readBytes() }
    return raw.copyOfRange(blobStart(raw, file), raw.size)
}

private fun blobStart(
    raw: ByteArray,
    file: File,
): Int =
    (0..raw.size - BLOB_MAGIC.size).find { start -> BLOB_MAGIC.indices.all { raw[start + it] == BLOB_MAGIC[it] } }
        ?: throw LordbaError("$file: holds no adapter blob; export the bundle again")
