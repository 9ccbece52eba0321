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
    blob
        .put(BLOB_MAGIC)
        .putInt(BLOB_VERSION)
        .putInt(modules.size)
        .putLong(total.toLong())
        .putLong(0)
    blob.put(records.array()).put(data.toByteArray())
    return blob.array()
}

/** The sizes (d_in, d_out) of a blob's modules, null where a layer has no adapter; throws [LordbaError]. */
fun blobSizes(blob: ByteArray): List<Pair<Int, Int>?> =
    records(blob).map { record -> record?.let { it.dIn to it.dOut } }

/** A blob's modules as float factors, null where a layer has no adapter; throws [LordbaError]. */
fun blobFactors(blob: ByteArray): List<Factors?> = records(blob).map { it?.factors(blob) }

private class BlobRecord(
    bytes: ByteBuffer,
    start: Int,
) {
    val r = bytes.getInt(start)
    val dIn = bytes.getInt(start + 4)
    val dOut = bytes.getInt(start + 8)
    private val number = bytes.getInt(start + 12)
    private val offsets = List(5) { bytes.getLong(start + 16 + 8 * it) }

    fun factors(blob: ByteArray): Factors {
        val code = ScaleCode.values().find { it.number == number }
        if (code == null ||
            minOf(r, dIn, dOut) < 0
        ) {
            throw LordbaError("adapter blob: a module has the scale code $number")
        }
        val (sIn, sMid, sOut) = listOf(dIn, r, dOut).mapIndexed { i, n -> scales(blob, offsets[2 + i], code, n) }
        val aSigns = RawTensor(DType.U8, listOf(r, packedWidth(dIn)), section(blob, offsets[0], r * packedWidth(dIn)))
        val bSigns = RawTensor(DType.U8, listOf(dOut, packedWidth(r)), section(blob, offsets[1], dOut * packedWidth(r)))
        return Factors(
            r,
            dIn,
            dOut,
            FloatArray(r * dIn) { aSigns.sign(it / dIn, it % dIn) * sMid[it / dIn] * sIn[it % dIn] },
            FloatArray(dOut * r) { bSigns.sign(it / r, it % r) * sOut[it / r] },
        )
    }

    private fun scales(
        blob: ByteArray,
        offset: Long,
        code: ScaleCode,
        n: Int,
    ): FloatArray {
        val prefix = mapOf(ScaleCode.LOG4 to 16, ScaleCode.INT8 to 2)[code] ?: 0
        val meaning = RawTensor(DType.F32, listOf(prefix), section(blob, offset, 4 * prefix)).floats()
        val stored = code.storedLength(n)
        val data = section(blob, offset + 4 * prefix, stored * code.dtype.bytes)
        return when (code) {
            ScaleCode.LOG4 -> FloatArray(n) { meaning[data[it / 2].toInt() shr 4 * (it % 2) and 15] }
            ScaleCode.INT8 -> FloatArray(n) { int8(data[it].toInt() and 0xff, meaning[0], meaning[1]) }
            else -> RawTensor(code.dtype, listOf(n), data).floats()
        }
    }

    private fun int8(
        code: Int,
        lo: Float,
        step: Float,
    ) = if (code == 0) 0f else lo + step * (code - 1)

    private fun section(
        blob: ByteArray,
        offset: Long,
        bytes: Int,
    ): ByteArray {
        if (offset < 0 || bytes < 0 || offset + bytes > blob.size) {
            throw LordbaError("adapter blob: a module reaches beyond the end; copy or export the bundle again")
        }
        return blob.copyOfRange(offset.toInt(), offset.toInt() + bytes)
    }
}

private fun records(blob: ByteArray): List<BlobRecord?> {
    val bytes = ByteBuffer.wrap(blob).order(ByteOrder.LITTLE_ENDIAN)
    if (blob.size < HEADER_BYTES || !blob.copyOf(BLOB_MAGIC.size).contentEquals(BLOB_MAGIC)) {
        throw LordbaError("not an adapter blob, or shorter than its header: ${blob.size} bytes")
    }
    val (version, count, total) = Triple(bytes.getInt(8), bytes.getInt(12), bytes.getLong(16))
    val recordsEnd = HEADER_BYTES + RECORD_BYTES.toLong() * count
    if (version != BLOB_VERSION || total !in 0..blob.size || count < 0 || recordsEnd > blob.size) {
        throw LordbaError("not an adapter blob of version $BLOB_VERSION, or truncated: ${blob.size} bytes of $total")
    }
    return List(count) { BlobRecord(bytes, HEADER_BYTES + RECORD_BYTES * it).takeIf { record -> record.r != 0 } }
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
