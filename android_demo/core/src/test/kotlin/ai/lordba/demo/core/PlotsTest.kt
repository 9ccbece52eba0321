package ai.lordba.demo.core

import org.junit.Test
import kotlin.test.assertEquals

class PlotsTest {
    @Test
    fun `ticks are round and cover the values`() {
        assertEquals(listOf(0.0, 1.0, 2.0, 3.0, 4.0), ticks(0.0, 4.0))
        assertEquals(listOf(0.0, 50.0, 100.0, 150.0), ticks(0.0, 121.0))
        assertEquals(listOf(2.0, 2.5, 3.0, 3.5), ticks(2.1, 3.4))
        assertEquals(listOf(3.0, 4.0), ticks(3.0, 3.0))
    }

    @Test
    fun `a curve lies in the unit square`() {
        assertEquals(listOf(0f to 1f, .5f to .5f, 1f to 0f), curve(listOf(4f, 2f, 0f), ticks(0.0, 4.0)))
        assertEquals(listOf(0f to 0f), curve(listOf(1f), listOf(1.0, 2.0)))
    }
}
