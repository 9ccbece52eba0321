package ai.lordba.demo.core

import kotlin.math.abs
import kotlin.math.floor
import kotlin.math.sqrt

/** A normal distribution's standard deviation over its median absolute deviation. */
private const val NORMAL_MAD = 1.4826

/** The percentile [q] (0 to 100) by linear interpolation, rounded as numpy rounds it. */
fun percentile(
    samples: List<Double>,
    q: Double,
): Double {
    val sorted = samples.sorted()
    val position = (sorted.size - 1) * (q / 100)
    val below = floor(position).toInt()
    val (a, b) = sorted[below] to sorted[minOf(below + 1, sorted.lastIndex)]
    val t = position - below
    return if (t >= 0.5) b - (b - a) * (1 - t) else a + (b - a) * t
}

fun median(samples: List<Double>): Double {
    val sorted = samples.sorted()
    val half = sorted.size / 2
    return if (sorted.size % 2 == 1) sorted[half] else (sorted[half - 1] + sorted[half]) / 2
}

/** How much longer than the base, in % of the base's median, null below the noise; and the noise of that difference. */
data class Overhead(
    val percent: Double?,
    val noisePercent: Double,
)

/** The noise is twice the standard error of the medians' difference, from the median absolute deviations. */
fun overhead(
    samples: List<Double>,
    base: List<Double>,
): Overhead {
    val noise = 100 * 2 * (standardError(samples) + standardError(base)) / median(base)
    val difference = 100 * (median(samples) / median(base) - 1)
    return Overhead(difference.takeIf { abs(it) >= noise }, noise)
}

private fun standardError(samples: List<Double>): Double {
    val middle = median(samples)
    return NORMAL_MAD * median(samples.map { abs(it - middle) }) / sqrt(samples.size.toDouble())
}
