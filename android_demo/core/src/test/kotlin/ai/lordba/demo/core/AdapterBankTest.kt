package ai.lordba.demo.core

import org.junit.Test
import java.io.File
import java.util.concurrent.CountDownLatch
import java.util.concurrent.TimeUnit
import kotlin.concurrent.thread
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals
import kotlin.test.assertFalse
import kotlin.test.assertTrue

class AdapterBankTest {
    private val folder = Golden.bundle()
    private val runner = FakeRunner()
    private val adapter = loadAdapter(Golden.file("adapter-log4"))
    private val prompt = intArrayOf(5, 6)

    @Test
    fun `adapters change the answer without loading anything twice`() {
        val bank = bank()
        val answers =
            listOf(null, "golden", null, "golden").map { name ->
                bank.use(name) { it.generate(prompt, 2).tokens }
            }
        assertEquals(listOf(7, 8), answers[0])
        assertEquals(answers[0], answers[2])
        assertEquals(answers[1], answers[3])
        assertTrue(answers[0] != answers[1])
        assertEquals(2, runner.log.count { it.startsWith("load") })
        assertEquals(4, runner.log.count { it.startsWith("use") })
    }

    @Test
    fun `the same adapter again keeps the cache, another forgets it`() {
        val bank = bank()
        bank.use("golden") { it.feed(prompt) }
        assertContentEquals(prompt, bank.use("golden") { it.cached })
        assertEquals(0, bank.use(null) { it.cached.size })
        assertEquals(0, bank.use("golden") { it.cached.size })
    }

    @Test
    fun `an installed adapter is the exporter's file, and stays after a restart`() {
        val bank = bank()
        bank.install("mine", adapter)
        assertEquals(listOf("golden", "mine"), bank.names)
        val again = readBundle(folder)
        assertContentEquals(again.adapterFile("golden")!!.readBytes(), again.adapterFile("mine")!!.readBytes())
        assertEquals(again.adapter("golden").copy(name = "mine", file = "adapters/mine.1"), again.adapter("mine"))
        bank.remove("mine")
        assertEquals(listOf("golden"), readBundle(folder).manifest.adapters.map { it.name })
        assertFalse(File(folder, "adapters/mine.1").exists())
        assertRefused("holds no adapter 'mine'") { bank.use("mine") {} }
    }

    @Test
    fun `replacing an adapter in use takes effect with the next use`() {
        val bank = bank { _, _, file -> newFile(file) { it.write(ByteArray(3)) } }
        bank.use("golden") { session ->
            bank.install("golden", adapter)
            assertEquals((6 + 1 + 653) % 400, session.generate(prompt, 1).tokens[0])
        }
        assertEquals(6 + 1 + 3, bank.use("golden") { it.generate(prompt, 1).tokens[0] })
        assertEquals(listOf("golden.1"), File(folder, "adapters").list()!!.toList())
    }

    @Test
    fun `an adapter of another base, model or name is refused and nothing changes`() {
        val before = File(folder, MANIFEST_NAME).readText()
        val bank = bank()
        val foreign = Adapter(adapter.modules, adapter.scaleCode, "other", "sha256:" + "1".repeat(64))
        assertRefused("another", "other", "sha256:111") { bank.install("another", foreign) }
        assertRefused("no place", "elsewhere") {
            bank.install(
                "mine",
                Adapter(mapOf("elsewhere" to adapter.modules.values.first()), ScaleCode.LOG4, null, null),
            )
        }
        val swapped =
            adapter.modules.keys
                .zip(adapter.modules.values.reversed())
                .toMap()
        assertRefused("another model") { bank.install("mine", Adapter(swapped, ScaleCode.LOG4, null, null)) }
        assertRefused("no usable file name") { bank.install("../mine", adapter) }
        assertEquals(before, File(folder, MANIFEST_NAME).readText())
        assertEquals(listOf("golden.bin"), File(folder, "adapters").list()!!.toList())
    }

    @Test
    fun `memory stays within the budget, and what is in use stays open`() {
        val bank = AdapterBank(readBundle(folder), runner, budget = 700)
        bank.install("second", adapter)
        bank.use("golden") { it.feed(prompt) }
        bank.use("second") { it.feed(prompt) }
        assertEquals(listOf("second"), bank.loaded)
        assertEquals(listOf("second.1"), runner.open.map { it.name })
        bank.use("golden") { it.feed(prompt) }
        assertEquals(3, runner.log.count { it.startsWith("load") })
        bank.close()
        assertTrue(runner.open.isEmpty() && runner.closed)
        assertRefused("closed meanwhile") { bank.use(null) {} }
        assertRefused("closed meanwhile") { bank.install("late", adapter) }
    }

    @Test
    fun `one generation at a time, and removal waits for its user`() {
        val bank = bank()
        val inside = CountDownLatch(1)
        val go = CountDownLatch(1)
        val order = java.util.Collections.synchronizedList(ArrayList<String>())
        val user =
            thread {
                bank.use("golden") {
                    inside.countDown()
                    go.await(5, TimeUnit.SECONDS)
                    order.add("used")
                }
            }
        inside.await(5, TimeUnit.SECONDS)
        val remover = thread { bank.remove("golden").also { order.add("removed") } }
        val waiter = thread { bank.use(null) { order.add("next") } }
        while ("golden" in bank.names) Thread.sleep(1)
        assertRefused("being removed") { bank.use("golden") {} }
        assertTrue(order.isEmpty())
        go.countDown()
        listOf(user, remover, waiter).forEach { it.join(5000) }
        assertEquals("used", order[0])
        assertEquals(setOf("used", "removed", "next"), order.toSet())
        assertRefused("one generation at a time") { bank.use(null) { bank.use(null) {} } }
        assertRefused("leave the session first") { bank.use(null) { bank.remove("golden") } }
    }

    @Test
    fun `a data file takes the header of the bundle's own`() {
        val template = ByteArray(48) { 9 } + makeBlob(listOf(null, null), 700)
        File(folder, "adapters/none.ptd").writeBytes(template)
        val manifest = parseJsonObject(File(folder, MANIFEST_NAME))
        manifest.addProperty("adapter_mode", "ptd")
        manifest.addProperty("no_adapter", "adapters/none.ptd")
        val bundle = Bundle(folder, manifestOf(manifest))
        val file = install(bundle, "mine", adapter).adapterFile("mine")!!
        assertContentEquals(template.copyOf(48) + makeBlob(adapter.modules.values.toList(), 700), file.readBytes())
    }

    @Test
    fun `an ONNX program gets the file that its bundle asks for`() {
        val manifest = parseJsonObject(File(folder, MANIFEST_NAME))
        manifest.addProperty("target", "onnx")
        manifest.addProperty("adapter_mode", "onnx_adapter")
        val paths = manifestOf(manifest).modules.filterNotNull()
        assertRefused("--android") { install(Bundle(folder, manifestOf(manifest)), "mine", adapter) }
        for (code in listOf(ScaleCode.LOG4, ScaleCode.FP32)) {
            manifest.add("android", jsonObject("format_version" to 1, "adapter_scale_code" to code.id))
            val file = install(Bundle(folder, manifestOf(manifest)), code.id, adapter).adapterFile(code.id)!!
            val blob = makeBlob(paths.map { adapter.modules.getValue(it).withCode(code) })
            assertContentEquals(onnxAdapterBytes(blob, adapter.baseFingerprint!!, paths), file.readBytes())
        }
        val (first, rest) = paths.first() to adapter.modules - paths.first()
        val fewer = Adapter(rest, adapter.scaleCode, adapter.baseName, adapter.baseFingerprint)
        val file = install(Bundle(folder, manifestOf(manifest)), "fewer", fewer).adapterFile("fewer")!!
        val (factors, whole) = blobFactors(blobOf(file)).first()!! to adapter.modules.getValue(first)
        assertEquals(Triple(1, whole.dIn, whole.dOut), Triple(factors.r, factors.dIn, factors.dOut))
        assertTrue((factors.a + factors.b).all { it == 0f })
        manifest.add("android", jsonObject("adapter_scale_code" to "fp16"))
        assertRefused("takes fp16 scales, the adapter has log4") {
            install(Bundle(folder, manifestOf(manifest)), "mine", adapter)
        }
    }

    private fun bank(write: WriteAdapter = ::writeAdapterFile) = AdapterBank(readBundle(folder), runner, write = write)
}
