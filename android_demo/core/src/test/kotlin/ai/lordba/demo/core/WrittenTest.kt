package ai.lordba.demo.core

import org.junit.Assume.assumeTrue
import org.junit.Before
import org.junit.Test
import java.io.File
import kotlin.test.assertEquals

/** Writes files for checks/read_back.py, which reads them with Python's lordba. */
class WrittenTest {
    private val folder = System.getProperty("lordba.written")?.let(::File)

    @Before
    fun somewhere() = assumeTrue("no -Dlordba.written=FOLDER to write to", folder != null)

    @Test
    fun `adapters of every scale code, as folder and as ONNX Runtime's file`() {
        for (code in ScaleCode.values()) {
            val adapter = loadAdapter(Golden.file("adapter-${code.id}"))
            saveAdapter(adapter, File(folder, "adapter-${code.id}"))
            for ((name, stored) in listOf(code.id to code, "${code.id}-as-fp32" to ScaleCode.FP32)) {
                val blob = makeBlob(adapter.modules.values.map { it.withCode(stored) })
                val bytes = onnxAdapterBytes(blob, adapter.baseFingerprint!!, adapter.modules.keys.toList())
                File(folder, "$name.onnx_adapter").writeBytes(bytes)
            }
        }
    }

    @Test
    fun `a bundle with an installed adapter, and with a fine-tuned one`() {
        val copy = File(folder, "bundle")
        Golden.bundle().copyRecursively(copy)
        val bank = AdapterBank(readBundle(copy), FakeRunner())
        bank.install("installed", loadAdapter(Golden.file("adapter-log4")))
        val tokenizer = Tokenizer.read(File(copy, "tokenizer.json"))
        val request = FineTuneRequest("Once upon a time there was a tokenizer.", "tuned", steps = 2, tokensPerStep = 8)
        FineTune(bank, tokenizer, FakeTrainers(), Golden.scratch()) {}.run(request)
        assertEquals(listOf("golden", "installed", "tuned"), bank.names)
    }

    @Test
    fun `a profile of a run`() {
        val bank = AdapterBank(readBundle(Golden.file("demo/bundle")), FakeRunner())
        val plan = LatencyPlan(listOf("golden"), prefillTokens = 20, decodeTokens = 4, rounds = 3)
        val series = LatencyRun(bank, plan, FakeClock()).run { _, _ -> true }
        val text =
            profileJson(
                series,
                Device("Pixel", "arm64-v8a", "Android 16", 1, 1),
                jsonObject("cores" to 8),
                jsonObject(),
            )
        File(folder, "profile.json").writeText(text)
    }
}
