package ai.lordba.demo.core

import org.junit.Test
import kotlin.test.assertEquals

class SamplerTest {
    @Test
    fun `tokens are the golden ones`() {
        val cases = Golden.objects("demo/sampling.json")
        assertEquals(40, cases.size)
        for (case in cases) {
            val sampling = Sampling(case.number("temperature"), case.int("top_k"), case.number("top_p"))
            assertEquals(
                case.int("token"),
                sample(case.get("logits").floats(), sampling, case.number("uniform")),
                "$case",
            )
        }
    }

    @Test
    fun `draws are in proportion to probabilities`() {
        val logits = floatArrayOf(0f, 1f, Float.NEGATIVE_INFINITY, 0f)
        val draws = 1000
        val counts = (0 until draws).groupingBy { sample(logits, Sampling(1.0), (it + 0.5) / draws) }.eachCount()
        assertEquals(mapOf(1 to 576, 0 to 212, 3 to 212), counts)
    }

    @Test
    fun `top k of the likeliest and of equal ones takes the first`() {
        val logits = FloatArray(50) { (it % 7).toFloat() }
        val drawn = (0 until 100).map { sample(logits, Sampling(1.0, topK = 3), it / 100.0) }.toSet()
        assertEquals(setOf(6, 13, 20), drawn)
    }
}
