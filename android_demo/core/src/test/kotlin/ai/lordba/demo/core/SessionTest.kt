package ai.lordba.demo.core

import org.junit.Test
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals
import kotlin.test.assertNull

class SessionTest {
    private val bundle = readBundle(Golden.file("demo/bundle")) // 64 tokens, ends at 0 and 2
    private val runner = FakeRunner().apply { use(load(null)) }
    private val session = Session(bundle, runner)

    @Test
    fun `a text is continued until an end token`() {
        val made = session.generate(intArrayOf(395, 396), 40)
        assertEquals(listOf(397, 398, 399), made.tokens) // then 0
        assertContentEquals(intArrayOf(395, 396, 397, 398, 399), session.cached)
    }

    @Test
    fun `what the cache holds is not run again, another text starts anew`() {
        session.generate(intArrayOf(10, 11), 3)
        runner.log.clear()
        assertEquals(2, session.generate(intArrayOf(10, 11, 12, 13, 50, 51), 1).prefillTokens)
        assertEquals(listOf("run 2 at 4"), runner.log)
        runner.log.clear()
        assertEquals(2, session.generate(intArrayOf(10, 12), 1).prefillTokens)
        assertEquals(listOf("run 2 at 0"), runner.log)
    }

    @Test
    fun `long texts go in pieces, and the cache's end ends the answer`() {
        runner.log.clear()
        val made = session.generate(IntArray(60) { 100 }, 100)
        assertEquals(listOf("run 8 at 0", "run 8 at 8"), runner.log.take(2))
        assertEquals(64 - 60 + 1, made.tokens.size)
        assertRefused("do not fit", "64") { session.generate(IntArray(65) { 9 }, 1) }
        assertRefused("empty") { session.generate(IntArray(0), 1) }
    }

    @Test
    fun `who listens can end it, and time is counted`() {
        val made = session.generate(intArrayOf(10), 20, clock = FakeClock()) { it < 13 }
        assertEquals(listOf(11, 12, 13), made.tokens)
        assertEquals(1_000_000, made.prefillNanos)
        assertEquals(2000.0, made.tokensPerSecond)
        assertNull(session.generate(intArrayOf(20), 1).tokensPerSecond)
    }
}
