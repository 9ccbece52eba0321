package ai.lordba.demo.core

import org.junit.Test
import java.io.File
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertFalse
import kotlin.test.assertIs
import kotlin.test.assertNotEquals
import kotlin.test.assertNull
import kotlin.test.assertTrue

class FineTuneTest {
    private val folder = Golden.bundle()
    private val scratch = Golden.scratch()
    private val bank = AdapterBank(readBundle(folder), FakeRunner())
    private val tokenizer = Tokenizer.read(File(folder, "tokenizer.json"))
    private val states = ArrayList<FineTuneState>()
    private val request =
        FineTuneRequest(
            "Once upon a time there was a little tokenizer. ".repeat(8),
            "mine",
            steps = 6,
            tokensPerStep = 12,
        )

    @Test
    fun `a run goes through its states and adds an adapter`() {
        val trainers = FakeTrainers()
        val end = tune(trainers).run(request)
        assertEquals(FineTuneState.Saved("mine", listOf(4f, 2f, 4f / 3, 1f, .8f, 4f / 6)), end)
        assertIs<FineTuneState.Preparing>(states.first())
        assertEquals((1..6).toList(), states.filterIsInstance<FineTuneState.Running>().map { it.losses.size })
        assertIs<FineTuneState.Saving>(states[states.size - 2])
        assertEquals(end, states.last())
        assertEquals(listOf("golden", "mine"), bank.names)
        assertEquals("golden-base", readBundle(folder).manifest.baseName)
        assertEquals(1, trainers.closed)
        assertNull(trainers.start)
        assertTrue(scratch.list()!!.isEmpty())
    }

    @Test
    fun `cancelling writes nothing`() {
        val before = File(folder, MANIFEST_NAME).readText()
        lateinit var tune: FineTune
        val trainers = FakeTrainers(beforeStep = { if (it == 2) tune.cancel() })
        tune = tune(trainers)
        assertEquals(3, assertIs<FineTuneState.Cancelled>(tune.run(request)).losses.size)
        assertEquals(before, File(folder, MANIFEST_NAME).readText())
        assertEquals(1, trainers.closed)
        assertTrue(scratch.list()!!.isEmpty())
    }

    @Test
    fun `a run that was killed goes on from its checkpoint with the same text`() {
        val whole = FakeTrainers().also { tune(it).run(request) }.seen
        bank.remove("mine")
        val killed = FakeTrainers(beforeStep = { if (it == 5) throw Killed() })
        assertFailsWith<Killed> { tune(killed, checkpointSteps = 2).run(request) }
        assertEquals(request, FineTuneFiles(scratch, bank.bundle.manifest.fingerprint).pending())
        assertNull(FineTuneFiles(scratch, "sha256:other").pending())
        val again = FakeTrainers()
        val end = assertIs<FineTuneState.Saved>(tune(again).resume())
        assertEquals(6, end.losses.size)
        assertEquals(whole.drop(4), again.seen)
        assertTrue("mine" in bank.names)
        assertRefused("no run to go on with") {
            throw LordbaError(assertIs<FineTuneState.Failed>(tune(again).resume()).message)
        }
    }

    @Test
    fun `a paused run goes on where it stopped`() {
        lateinit var tune: FineTune
        tune = tune(FakeTrainers(beforeStep = { if (it == 2) tune.pause() }))
        assertEquals(3, assertIs<FineTuneState.Paused>(tune.run(request)).losses.size)
        val again = FakeTrainers()
        assertIs<FineTuneState.Saved>(tune(again).resume())
        assertEquals(3, again.seen.size)
    }

    @Test
    fun `going on from an adapter hands over its factors`() {
        val trainers = FakeTrainers()
        tune(trainers).run(request.copy(start = "golden"))
        val module = loadAdapter(Golden.file("adapter-log4")).modules.getValue("layers.0.proj")
        val factors = trainers.start!![0]!!
        assertEquals(listOf(3, 13, 10), listOf(factors.r, factors.dIn, factors.dOut))
        assertEquals(
            module.aSigns.sign(2, 11) * module.sMid.decode()[2] * module.sIn.decode()[11],
            factors.a[
                2 * 13 +
                    11,
            ],
        )
        assertEquals(module.bSigns.sign(7, 1) * module.sOut.decode()[7], factors.b[7 * 3 + 1])
    }

    @Test
    fun `factors of every scale code are those of the adapter`() {
        for (code in ScaleCode.values()) {
            val modules = loadAdapter(Golden.file("adapter-${code.id}")).modules.values.toList()
            val factors = blobFactors(Golden.file("blob-${code.id}.bin").readBytes())
            assertNull(factors[2])
            for ((module, found) in modules.zip(factors)) {
                val (sIn, sMid, sOut) = module.scales.map { it.decode() }
                val expected =
                    FloatArray(module.r * module.dIn) {
                        module.aSigns.sign(it / module.dIn, it % module.dIn) *
                            sMid[it / module.dIn] *
                            sIn[it % module.dIn]
                    }
                expected.indices.forEach { assertEquals(expected[it], found!!.a[it], 1e-6f * sMid.max() * sIn.max()) }
                expected.indices.count { expected[it] < 0 }.let { assertTrue(it > 0) }
                assertEquals(sOut[1] * module.bSigns.sign(1, 0), found!!.b[module.r], 1e-6f)
            }
        }
    }

    @Test
    fun `what cannot work is said before anything runs`() {
        failed("no usable file name", request.copy(adapter = "a/b"))
        failed("already", request.copy(adapter = "golden"))
        failed("at least one step", request.copy(steps = 0))
        failed("paste some more text", request.copy(text = "a"))
        failed("no trainer here", request, FakeTrainers(problem = "no trainer here"))
        failed("smaller learning rate", request, FakeTrainers(divergesAt = 3))
        assertEquals(listOf("golden"), bank.names)
    }

    @Test
    fun `windows cover the text, and epochs take each once in a new order`() {
        assertEquals(listOf(5, 5, 3), windows(IntArray(13), 5).map { it.size })
        assertEquals(listOf(5, 5), windows(IntArray(11), 5).map { it.size })
        val order = epochs(10, 3).take(20).toList()
        assertEquals((0..9).toList(), order.take(10).sorted())
        assertEquals((0..9).toList(), order.drop(10).sorted())
        assertNotEquals(order.take(10), order.drop(10))
        assertEquals(order, epochs(10, 3).take(20).toList())
        assertFalse(order == epochs(10, 4).take(20).toList())
    }

    private class Killed : RuntimeException()

    private fun tune(
        trainers: TrainerFactory,
        checkpointSteps: Int = 10,
    ) = FineTune(bank, tokenizer, trainers, scratch, checkpointSteps) { states.add(it) }

    private fun failed(
        words: String,
        request: FineTuneRequest,
        trainers: FakeTrainers = FakeTrainers(),
    ) {
        val end = assertIs<FineTuneState.Failed>(tune(trainers).run(request))
        assertTrue(words in end.message, end.message)
    }
}
