package ai.lordba.demo.core

import com.google.gson.JsonArray
import com.google.gson.JsonObject
import java.io.File
import java.io.IOException
import java.io.RandomAccessFile
import java.nio.ByteBuffer
import java.nio.ByteOrder

/** Element types that adapters use, in the order in which safetensors lays tensors out. */
enum class DType(
    val bytes: Int,
) {
    F32(4),
    F16(2),
    U8(1),
}

/** A tensor as stored, little endian. */
class RawTensor(
    val dtype: DType,
    val shape: List<Int>,
    val data: ByteArray,
) {
    val size: Int get() = data.size / dtype.bytes

    init {
        require(shape.fold(1L) { n, side -> n * side } * dtype.bytes == data.size.toLong())
    }

    /** F16 and F32 elements as float32. */
    fun floats(): FloatArray {
        val buffer = ByteBuffer.wrap(data).order(ByteOrder.LITTLE_ENDIAN)
        return when (dtype) {
            DType.F32 -> FloatArray(size) { buffer.getFloat(4 * it) }
            DType.F16 -> FloatArray(size) { halfToFloat(buffer.getShort(2 * it)) }
            DType.U8 -> throw IllegalArgumentException("codes are no floats")
        }
    }
}

/** A safetensors file in memory. */
class Safetensors(
    val metadata: Map<String, String>,
    val tensors: Map<String, RawTensor>,
)

/** Reads a safetensors file of [DType]s; throws [LordbaError] if it is truncated, damaged or holds something else. */
fun readSafetensors(file: File): Safetensors =
    try {
        RandomAccessFile(file, "r").use { readSafetensors(it) }
    } catch (error: IOException) {
        throw unreadable(file, error)
    } catch (error: JsonShapeError) {
        throw unreadable(file, error)
    }

private fun unreadable(
    file: File,
    error: Exception,
) = LordbaError("$file: cannot be read (${error.message}); it is truncated or damaged, copy it anew", error)

private fun readSafetensors(file: RandomAccessFile): Safetensors {
    val length = ByteArray(8).also(file::readFully)
    val headerBytes = ByteBuffer.wrap(length).order(ByteOrder.LITTLE_ENDIAN).long
    val start = 8 + headerBytes
    if (headerBytes !in 2..MOST_HEADER_BYTES || start > file.length()) {
        throw JsonShapeError("a header of $headerBytes bytes in ${file.length()} bytes")
    }
    val text = ByteArray(headerBytes.toInt()).also(file::readFully)
    val header =
        parseJson(String(text, Charsets.UTF_8)) as? JsonObject ?: throw JsonShapeError("its header is no object")
    val metadata =
        header
            .getAsJsonObject("__metadata__")
            ?.entrySet()
            .orEmpty()
            .associate { (k, v) -> k to v.asText(k) }
    val entries =
        header
            .entrySet()
            .filter { it.key != "__metadata__" }
            .map { (name, value) -> entryOf(name, value as? JsonObject ?: throw JsonShapeError("'$name'")) }
            .sortedBy { it.begin }
    var expected = 0L
    for (entry in entries) {
        if (entry.begin != expected) throw JsonShapeError("${entry.name} begins at ${entry.begin}, not at $expected")
        expected = entry.end
    }
    if (start + expected != file.length()) {
        throw JsonShapeError("${file.length() - start} bytes of data, expected $expected")
    }
    val tensors =
        entries.associate { entry ->
            val data = ByteArray((entry.end - entry.begin).toInt()).also(file::readFully)
            entry.name to RawTensor(entry.dtype, entry.shape, data)
        }
    return Safetensors(metadata, tensors)
}

private class Entry(
    val name: String,
    val dtype: DType,
    val shape: List<Int>,
    val begin: Long,
    val end: Long,
)

private fun entryOf(
    name: String,
    json: JsonObject,
): Entry {
    val code = json.string("dtype")
    val dtype = DType.values().find { it.name == code } ?: throw JsonShapeError("$name has the dtype $code")
    val shape = json.list("shape").map { it.asWhole("shape") }
    val offsets = json.list("data_offsets").map { it.asWhole("data_offsets") }
    if (shape.any { it !in 0..MOST_ELEMENTS } || offsets.size != 2) throw JsonShapeError("$name has no usable shape")
    val bytes = shape.fold(dtype.bytes.toLong()) { n, side -> if (n > MOST_ELEMENTS) n else n * side }
    if (bytes > MOST_ELEMENTS || offsets[1] - offsets[0] != bytes) {
        throw JsonShapeError("$name takes ${offsets[1] - offsets[0]} bytes, its shape $bytes")
    }
    return Entry(name, dtype, shape.map { it.toInt() }, offsets[0], offsets[1])
}

/** The bytes of a safetensors file, the same as lordba's own writer makes of these tensors. */
fun safetensorsBytes(
    tensors: Map<String, RawTensor>,
    metadata: Map<String, String>,
): ByteArray {
    val order = tensors.toList().sortedWith(compareBy({ it.second.dtype }, { it.first }))
    val header = JsonObject()
    header.add("__metadata__", JsonObject().apply { metadata.toSortedMap().forEach { (k, v) -> addProperty(k, v) } })
    var begin = 0
    for ((name, tensor) in order) {
        val end = begin + tensor.data.size
        val entry = JsonObject()
        entry.addProperty("dtype", tensor.dtype.name)
        entry.add("shape", JsonArray().apply { tensor.shape.forEach { add(it) } })
        entry.add("data_offsets", JsonArray().apply { listOf(begin, end).forEach { add(it) } })
        header.add(name, entry)
        begin = end
    }
    val text = header.toString().toByteArray(Charsets.UTF_8)
    val padded = (text.size + 7) / 8 * 8 // the data stays aligned
    val bytes = ByteBuffer.allocate(8 + padded + begin).order(ByteOrder.LITTLE_ENDIAN)
    bytes.putLong(padded.toLong()).put(text)
    repeat(padded - text.size) { bytes.put(' '.code.toByte()) }
    order.forEach { bytes.put(it.second.data) }
    return bytes.array()
}

/** IEEE half precision to float32, exactly. */
fun halfToFloat(half: Short): Float {
    val bits = half.toInt() and 0xffff
    val sign = if (bits and 0x8000 == 0) 1f else -1f
    val exponent = bits shr 10 and 0x1f
    val fraction = bits and 0x3ff
    return when (exponent) {
        0 -> sign * fraction * SMALLEST_HALF
        31 -> if (fraction == 0) sign * Float.POSITIVE_INFINITY else Float.NaN
        else -> java.lang.Float.intBitsToFloat(bits and 0x8000 shl 16 or (exponent + 112 shl 23) or (fraction shl 13))
    }
}

private const val MOST_HEADER_BYTES = 100_000_000L
private const val MOST_ELEMENTS = 1L shl 30
private const val SMALLEST_HALF = 1f / (1 shl 24)
