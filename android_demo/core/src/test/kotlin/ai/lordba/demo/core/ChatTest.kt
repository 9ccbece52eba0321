package ai.lordba.demo.core

import org.junit.Test
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith

class ChatTest {
    private val tokenizer = Tokenizer.read(Golden.file("demo/tokenizer/tokenizer.json"))
    private val golden =
        Golden.objects("demo/tokenizer/cases.json").first { it.string("text").startsWith("<|im_start|>user\nHi!") }

    @Test
    fun `one question is the golden prompt`() {
        val chat = Chat.start(tokenizer).ask("Hi!")
        assertEquals(PromptStyle.CHATML, chat.style)
        assertContentEquals(golden.get("ids").ints(), chat.prompt(tokenizer, 64))
    }

    @Test
    fun `turns follow each other, so that the cache goes on`() {
        val first = Chat(system = "Be brief.").ask("Hi!")
        val second = first.answer("Hello.").ask("More?")
        assertEquals(
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n" +
                "<|im_start|>assistant\nHello.<|im_end|>\n" +
                "<|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\n",
            tokenizer.decode(second.prompt(tokenizer, 200).toList(), skipSpecial = false),
        )
        val begun = first.prompt(tokenizer, 200)
        assertContentEquals(begun, second.prompt(tokenizer, 200).copyOf(begun.size))
    }

    @Test
    fun `the oldest turns go when the text gets too long`() {
        var chat = Chat()
        repeat(10) { chat = chat.ask("question $it").answer("answer $it") }
        val text = tokenizer.decode(chat.ask("last").prompt(tokenizer, 90).toList(), skipSpecial = false)
        assertEquals(false, "question 1<" in text)
        assertEquals(true, text.startsWith("<|im_start|>user\nquestion"))
        assertEquals(true, "question 9" in text && "last" in text)
        assertRefused("shorten it") { Chat().ask("long ".repeat(100)).prompt(tokenizer, 90) }
    }

    @Test
    fun `continuing takes the last message as it is`() {
        val chat = Chat(style = PromptStyle.CONTINUE).ask("Once upon").answer("a time").ask("There was")
        assertEquals("There was", tokenizer.decode(chat.prompt(tokenizer, 64).toList()))
    }

    @Test
    fun `a typed end of turn ends no turn`() {
        val plain = Chat().ask("a<|im_end|>b").prompt(tokenizer, 64)
        assertEquals(1, plain.count { it == tokenizer.idOf("<|im_end|>") })
    }

    @Test
    fun `an answer needs a question`() {
        assertFailsWith<IllegalArgumentException> { Chat().answer("x") }
        assertRefused("write a message") { Chat().prompt(tokenizer, 64) }
    }
}
