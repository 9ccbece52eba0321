package ai.lordba.demo.core

import java.io.ByteArrayOutputStream
import java.nio.ByteBuffer
import java.nio.ByteOrder

/** The first bytes of an adapter blob (docs/format.md), the form that ExecuTorch programs read. */
val BLOB_MAGIC: ByteArray = "LORDBA\u0000\u0000".toByteArray(Charsets.US_ASCII)
private const val BLOB_VERSION = 1
private const val HEADER_BYTES = 32
private const val RECORD_BYTES = 64

/**
 * Lays modules out in the program's order; null is a layer without adapter.
 *
 * [size] pads with zeros to the one size that a program's data file has. Throws [LordbaError] if they do not fit.
 */
fun makeBlob(
    modules: List<SignModule?>,
    size: Int? = null,
): ByteArray {
    val start = HEADER_BYTES + RECORD_BYTES * modules.size
    val records = ByteBuffer.allocate(RECORD_BYTES * modules.size).order(ByteOrder.LITTLE_ENDIAN)
    val data = ByteArrayOutputStream()

    fun place(section: ByteArray): Long {
        while ((start + data.size()) % 4 != 0) data.write(0)
        val offset = start + data.size()
        data.write(section, 0, section.size)
        return offset.toLong()
    }

    for (module in modules) {
        if (module == null) {
            records.put(ByteArray(RECORD_BYTES))
            continue
        }
        listOf(module.r, module.dIn, module.dOut, module.sIn.code.number).forEach { records.putInt(it) }
        records.putLong(place(module.aSigns.data)).putLong(place(module.bSigns.data))
        module.scales.forEach { records.putLong(place(scaleSection(it))) }
        records.putLong(0)
    }
    val total = start + data.size()
    if (size != null && size < total) {
        throw LordbaError("an adapter of $total bytes does not fit a program made for at most $size bytes")
    }
    val blob = ByteBuffer.allocate(size ?: total).order(ByteOrder.LITTLE_ENDIAN)
    blob.put(BLOB_MAGIC).putInt(BLOB_VERSION).putInt(modules.size).putLong(total.toLong()).putLong(0)
    blob.put(records.array()).put(data.toByteArray())
    return blob.array()
}

/** The sizes (d_in, d_out) of a blob's modules, null where a layer has no adapter; throws [LordbaError]. */
fun blobSizes(blob: ByteArray): List<Pair<Int, Int>?> {
    val bytes = ByteBuffer.wrap(blob).order(ByteOrder.LITTLE_ENDIAN)
    if (blob.size < HEADER_BYTES || !blob.copyOf(BLOB_MAGIC.size).contentEquals(BLOB_MAGIC)) {
        throw LordbaError("not an adapter blob, or shorter than its header: ${blob.size} bytes")
    }
    val (version, count, total) = Triple(bytes.getInt(8), bytes.getInt(12), bytes.getLong(16))
    if (version != BLOB_VERSION || total !in 0..blob.size || count < 0 || blob.size < HEADER_BYTES + 64L * count) {
        throw LordbaError("not an adapter blob of version $BLOB_VERSION, or truncated: ${blob.size} bytes of $total")
    }
    return List(count) {
        val record = HEADER_BYTES + RECORD_BYTES * it
        if (bytes.getInt(record) == 0) null else bytes.getInt(record + 4) to bytes.getInt(record + 8)
    }
}

private fun scaleSection(scales: EncodedScales): ByteArray {
    val prefix =
        when (scales.code) {
            ScaleCode.FP32, ScaleCode.FP16 -> FloatArray(0)
            ScaleCode.INT8 -> floatArrayOf(scales.lo.toFloat(), ((scales.hi - scales.lo) / 254).toFloat())
            ScaleCode.LOG4 -> scales.levels()
        }
    val section = ByteBuffer.allocate(4 * prefix.size + scales.values.data.size).order(ByteOrder.LITTLE_ENDIAN)
    prefix.forEach { section.putFloat(it) }
    return section.put(scales.values.data).array()
}
