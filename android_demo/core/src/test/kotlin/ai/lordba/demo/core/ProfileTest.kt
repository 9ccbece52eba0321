package ai.lordba.demo.core

import com.google.gson.JsonObject
import org.junit.Test
import kotlin.test.assertEquals
import kotlin.test.assertNotNull
import kotlin.test.assertNull

class ProfileTest {
    @Test
    fun `the profile file is Python's byte for byte`() {
        val given = Golden.json("demo/profile/samples.json")
        val text =
            profileJson(
                given.objects("series").map(::seriesOf),
                deviceOf(given),
                given.nested("machine"),
                given.nested("conditions"),
            )
        assertEquals(Golden.file("demo/profile/profile.json").readText(), text)
    }

    @Test
    fun `a difference below the noise is not quoted`() {
        val base = listOf(1.0, 1.1, 0.9, 1.05, 0.95)
        assertNull(overhead(base.map { it + 0.01 }, base).percent)
        assertEquals(50.0, assertNotNull(overhead(base.map { it + 0.5 }, base).percent), 1e-9)
        assertEquals(0.0, overhead(listOf(2.0, 2.0), listOf(2.0, 2.0)).noisePercent)
    }

    @Test
    fun `percentiles interpolate`() {
        assertEquals(2.5, percentile(listOf(4.0, 1.0, 3.0, 2.0), 50.0))
        assertEquals(3.7, percentile(listOf(4.0, 1.0, 3.0, 2.0), 90.0), 1e-12)
        assertEquals(5.0, percentile(listOf(5.0), 99.0))
        assertEquals(2.5, median(listOf(4.0, 1.0, 3.0, 2.0)))
    }

    private fun deviceOf(given: JsonObject): Device {
        val json = given.nested("device")
        return Device(
            json.string("device"),
            json.string("arch"),
            json.string("os"),
            json.long("totalMem"),
            json.long("availMem"),
        )
    }

    private fun seriesOf(json: JsonObject) =
        Series(
            json.string("target"),
            json.string("model"),
            json.string("base_quant"),
            json.string("adapter"),
            json.string("phase"),
            json.int("T"),
            json.int("threads"),
            json.list("samples").map { it.asDouble },
            json.textOrNull("adapter_name"),
            json.get("rank").takeUnless { it.isJsonNull }?.asInt,
            json.get("bits").takeUnless { it.isJsonNull }?.asDouble,
            json.textOrNull("scale_code"),
        )
}
