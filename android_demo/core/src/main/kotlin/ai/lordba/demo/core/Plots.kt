package ai.lordba.demo.core

import kotlin.math.ceil
import kotlin.math.floor
import kotlin.math.log10
import kotlin.math.pow

/** The values of an axis that covers [low] to [high] in about [steps] round steps, its ends included. */
fun ticks(
    low: Double,
    high: Double,
    steps: Int = 4,
): List<Double> {
    val span = if (high > low) high - low else maxOf(kotlin.math.abs(high), 1.0)
    val magnitude = 10.0.pow(floor(log10(span / steps)))
    val step = listOf(1, 2, 5, 10).map { it * magnitude }.first { it >= span / steps * 0.999 }
    val first = floor(low / step + 1e-9).toInt()
    val last = maxOf(ceil(high / step - 1e-9).toInt(), first + 1)
    return (first..last).map { it * step }
}

/** Points of a curve through [values] in a unit square whose y axis, upwards, covers [axis]. */
fun curve(
    values: List<Float>,
    axis: List<Double>,
): List<Pair<Float, Float>> {
    val (low, high) = axis.first() to axis.last()
    return values.mapIndexed { i, value ->
        val x = if (values.size == 1) 0f else i.toFloat() / (values.size - 1)
        x to ((value - low) / (high - low)).toFloat()
    }
}
