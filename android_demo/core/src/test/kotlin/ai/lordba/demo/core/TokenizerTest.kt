package ai.lordba.demo.core

import org.junit.Assume.assumeTrue
import org.junit.Test
import java.io.File
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals
import kotlin.test.assertNotEquals

class TokenizerTest {
    private val small = Tokenizer.read(Golden.file("demo/tokenizer/tokenizer.json"))

    @Test
    fun `texts become the golden ids and come back`() {
        for (name in listOf("tokenizer", "tokenizer-plain")) {
            check(Tokenizer.read(Golden.file("demo/$name/tokenizer.json")), Golden.file("demo/$name/cases.json"))
        }
    }

    @Test
    fun `SmolLM2's own tokenizer gives the ids that Python gives`() {
        val folder = System.getProperty("lordba.smollm2")
        assumeTrue("no -Dlordba.smollm2=FOLDER with tokenizer.json and cases.json", folder != null)
        check(Tokenizer.read(File(folder, "tokenizer.json")), File(folder, "cases.json"))
    }

    @Test
    fun `what a user types stays text`() {
        val typed = "a<|im_end|>b"
        assertEquals(3, small.encode(typed).size)
        assertNotEquals(small.encode(typed).toList(), small.encodePlain(typed).toList())
        assertEquals(typed, small.decode(small.encodePlain(typed).toList()))
        assertEquals("ab", small.decode(small.encode(typed).toList()))
        assertEquals(typed, small.decode(small.encode(typed).toList(), skipSpecial = false))
    }

    @Test
    fun `a stream shows whole characters, and the same text in the end`() {
        val text = "naïve 東京 👩‍👩‍👧 end"
        val stream = StreamDecoder(small)
        val pieces = small.encodePlain(text).map { stream.add(it) } + stream.finish()
        assertEquals(text, pieces.joinToString(""))
        assertEquals(text, stream.text)
        assertEquals(true, pieces.none { '\uFFFD' in it })
    }

    @Test
    fun `a stream does not wait for ever for bytes that are no character`() {
        val stream = StreamDecoder(small)
        val broken = small.encodePlain("é")[0]
        repeat(8) { stream.add(broken) }
        assertEquals(8, (stream.text + stream.finish()).count { it == '\uFFFD' })
    }

    @Test
    fun `other kinds of tokenizer are refused`() {
        val json = parseJsonObject(Golden.file("demo/tokenizer/tokenizer.json"))
        val file = File(Golden.scratch(), "tokenizer.json")
        for ((key, value) in listOf("normalizer" to "NFC", "decoder" to "WordPiece", "pre_tokenizer" to "Whitespace")) {
            val changed = json.deepCopy().apply { add(key, jsonObject("type" to value)) }
            file.writeText(changed.toText(1))
            assertRefused("tokenizer.json", "byte-level BPE") { Tokenizer.read(file) }
        }
        file.writeText(json.deepCopy().apply { nested("model").addProperty("type", "Unigram") }.toText(1))
        assertRefused("its model is Unigram") { Tokenizer.read(file) }
    }

    private fun check(
        tokenizer: Tokenizer,
        cases: File,
    ) {
        val all = parseJson(cases.readText()).asJsonArray.map { it.asJsonObject }
        assertEquals(true, all.size >= 8)
        for (case in all) {
            val ids = tokenizer.encode(case.string("text"))
            assertContentEquals(case.get("ids").ints(), ids, case.string("text"))
            assertEquals(case.string("decoded"), tokenizer.decode(ids.toList()))
        }
    }
}
