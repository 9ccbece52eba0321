package ai.lordba.demo.core

import com.google.gson.JsonObject
import org.junit.Test
import kotlin.test.assertEquals
import kotlin.test.assertTrue

class LatencyTest {
    private val bank = AdapterBank(readBundle(Golden.file("demo/bundle")), FakeRunner())
    private val plan = LatencyPlan(listOf("golden"), prefillTokens = 20, decodeTokens = 4, rounds = 3, warmUp = 1)

    @Test
    fun `every phase is measured with the adapter and without, warm-up left out`() {
        val rounds = ArrayList<Int>()
        val series = LatencyRun(bank, plan, FakeClock()).run { done, of -> rounds.add(of - done).let { true } }
        assertEquals(listOf(3, 2, 1, 0), rounds)
        val counts = series.associate { (it.adapter to it.phase) to it.samples.size }
        val expected =
            listOf("none", "lordba").flatMap { a ->
                listOf("swap" to 3, "prefill" to 3, "decode" to 12).map { (p, n) ->
                    (
                        a to
                            p
                    ) to
                        n
                }
            }
        assertEquals(expected.toMap(), counts)
        assertTrue(series.all { it.samples.all { ms -> ms == 1.0 } })
        assertEquals(listOf(0, 20, 1), series.take(3).map { it.tokens })
        val row = profileRows(series).last()
        assertEquals("golden", row.string("adapter_name"))
        assertEquals(2.592, row.number("bits"))
    }

    @Test
    fun `it ends early when told, and refuses what does not fit`() {
        val series = LatencyRun(bank, plan, FakeClock()).run { done, _ -> done < 2 }
        assertEquals(1, series.first { it.phase == "prefill" }.samples.size)
        assertRefused("do not fit", "64") { LatencyRun(bank, plan.copy(prefillTokens = 61)).run { _, _ -> true } }
    }

    private fun profileRows(series: List<Series>): List<JsonObject> {
        val text = profileJson(series, Device("d", "a", "o", 1, 1), JsonObject(), JsonObject())
        return (parseJson(text) as JsonObject).objects("rows")
    }
}
