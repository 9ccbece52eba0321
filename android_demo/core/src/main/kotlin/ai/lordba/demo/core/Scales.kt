package ai.lordba.demo.core

/** How a vector of channel scales is stored; [number] is its code in an adapter blob. */
enum class ScaleCode(
    val id: String,
    val number: Int,
    val dtype: DType,
) {
    FP32("fp32", 0, DType.F32),
    FP16("fp16", 1, DType.F16),
    INT8("int8", 2, DType.U8),
    LOG4("log4", 3, DType.U8),
    ;

    /** Whether the stored values are codes that need a range. */
    val isCoded: Boolean get() = this == INT8 || this == LOG4

    /** Elements that store n scales: two log4 codes share a byte. */
    fun storedLength(n: Int): Int = if (this == LOG4) (n + 1) / 2 else n

    companion object {
        fun of(id: String): ScaleCode? = values().find { it.id == id }
    }
}

/** One scale vector of length [n] as stored: codes or floats and, for codes, [range] = fp16 [lo, hi]. */
class EncodedScales(
    val code: ScaleCode,
    val n: Int,
    val values: RawTensor,
    val range: RawTensor?,
) {
    /** Stored bytes, range included. */
    val bytes: Int get() = values.data.size + (range?.data?.size ?: 0)

    /** The smallest positive and the largest scale; of codes only. */
    val lo: Double get() = range!!.floats()[0].toDouble()
    val hi: Double get() = range!!.floats()[1].toDouble()

    /** What each code means: 16 values for log4, 256 for int8, the first of them 0. */
    fun levels(): FloatArray {
        val top = if (code == ScaleCode.LOG4) 15 else 255
        val (lo, hi) = lo to hi
        return FloatArray(top + 1) {
            val step = (it - 1).toDouble() / (top - 1)
            when {
                it == 0 -> 0f
                code == ScaleCode.LOG4 -> (lo * Math.pow(hi / lo, step)).toFloat()
                else -> (lo + (hi - lo) * step).toFloat()
            }
        }
    }

    /** The scales, float32 [n]. */
    fun decode(): FloatArray {
        if (!code.isCoded) return values.floats()
        val meaning = levels()
        return FloatArray(n) {
            val byte = values.data[if (code == ScaleCode.LOG4) it / 2 else it].toInt() and 0xff
            meaning[if (code == ScaleCode.INT8) byte else byte shr 4 * (it % 2) and 15]
        }
    }

    /** Throws [LordbaError] if a vector that was read breaks the format; [where] names file and tensor. */
    fun check(where: String) {
        val expected = code.storedLength(n)
        if (values.dtype != code.dtype || values.shape != listOf(expected)) {
            throw LordbaError(
                "$where: ${code.id} scales of $n channels are $expected elements of ${code.dtype}, found " +
                    "${values.shape} of ${values.dtype}; the file does not match its configuration",
            )
        }
        if (!code.isCoded) {
            if (values.floats().any { it.isNaN() || it.isInfinite() || it < 0 }) {
                throw LordbaError("$where: scales must be finite and not negative; write the adapter anew")
            }
            return
        }
        if (range == null || range.dtype != DType.F16 || range.shape != listOf(2)) {
            throw LordbaError("$where: ${code.id} scales need a range tensor, fp16 [2] = (lo, hi), which is missing")
        }
        if (!(0 < lo && lo <= hi && hi < Double.POSITIVE_INFINITY)) {
            throw LordbaError("$where: the range must be 0 < lo <= hi and finite, found lo=$lo, hi=$hi")
        }
    }
}
