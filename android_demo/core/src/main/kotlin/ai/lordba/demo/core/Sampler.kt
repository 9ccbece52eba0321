package ai.lordba.demo.core

import kotlin.math.exp
import kotlin.math.min

/** How the next token is drawn; temperature 0 takes the likeliest, [topK] 0 and [topP] 1 leave all in. */
data class Sampling(
    val temperature: Double = 0.0,
    val topK: Int = 0,
    val topP: Double = 1.0,
) {
    init {
        require(temperature >= 0 && topK >= 0 && topP > 0 && topP <= 1)
    }
}

/** Draws a token from logits [vocabulary]; [uniform] is a random number in [0, 1). Of equal logits the first wins. */
fun sample(
    logits: FloatArray,
    sampling: Sampling,
    uniform: Double,
): Int {
    if (sampling.temperature == 0.0) return argmax(logits)
    val order = likeliest(logits, if (sampling.topK == 0) logits.size else min(sampling.topK, logits.size))
    val largest = logits[order[0]] / sampling.temperature
    val p = DoubleArray(order.size) { exp(logits[order[it]] / sampling.temperature - largest) }
    normalize(p, p.size)
    val kept = min(firstOver(p, p.size) { it >= sampling.topP } + 1, p.size)
    normalize(p, kept)
    return order[min(firstOver(p, kept) { it > uniform }, kept - 1)]
}

/** The first of the largest. */
fun argmax(values: FloatArray): Int {
    var best = 0
    for (i in values.indices) if (values[i] > values[best]) best = i
    return best
}

/** Indices of the k largest, largest first, equal ones by index. */
private fun likeliest(
    logits: FloatArray,
    k: Int,
): IntArray {
    val worstFirst = Comparator<Int> { a, b -> if (logits[a] != logits[b]) logits[a].compareTo(logits[b]) else b - a }
    val heap = java.util.PriorityQueue<Int>(k + 1, worstFirst)
    for (i in logits.indices) {
        if (heap.size == k && worstFirst.compare(i, heap.peek()!!) < 0) continue
        heap.add(i)
        if (heap.size > k) heap.poll()
    }
    return IntArray(heap.size).also { for (i in it.indices.reversed()) it[i] = heap.poll()!! }
}

private fun normalize(
    p: DoubleArray,
    n: Int,
) {
    val sum = (0 until n).sumOf { p[it] }
    for (i in 0 until n) p[i] /= sum
}

private fun firstOver(
    p: DoubleArray,
    n: Int,
    reached: (Double) -> Boolean,
): Int {
    var sum = 0.0
    for (i in 0 until n) {
        sum += p[i]
        if (reached(sum)) return i
    }
    return n
}
