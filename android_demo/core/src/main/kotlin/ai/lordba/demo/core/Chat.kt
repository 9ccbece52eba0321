package ai.lordba.demo.core

/** Who said something. */
enum class Role { USER, ASSISTANT }

data class Message(
    val role: Role,
    val text: String,
)

/** How messages become the text that a model continues. */
enum class PromptStyle {
    /** Turns between `<|im_start|>` and `<|im_end|>`, for models trained to chat so. */
    CHATML,

    /** The last message as it is: the model goes on writing. What the shipped adapters are made for. */
    CONTINUE,
}

/** A conversation; immutable, so that a screen can show any state of it. */
data class Chat(
    val messages: List<Message> = emptyList(),
    val style: PromptStyle = PromptStyle.CHATML,
    val system: String? = null,
) {
    /** The conversation after the user said something, with an empty answer to fill. */
    fun ask(text: String): Chat = copy(messages = messages + Message(Role.USER, text) + Message(Role.ASSISTANT, ""))

    /** The conversation with this as its last answer. */
    fun answer(text: String): Chat {
        require(messages.lastOrNull()?.role == Role.ASSISTANT) { "nothing was asked" }
        return copy(messages = messages.dropLast(1) + Message(Role.ASSISTANT, text))
    }

    /**
     * The tokens that the model continues with the last answer.
     *
     * If they would exceed [longest], the oldest turns are left out. Throws [LordbaError] if the last message alone does.
     */
    fun prompt(
        tokenizer: Tokenizer,
        longest: Int,
    ): IntArray {
        val asked = if (messages.lastOrNull()?.role == Role.ASSISTANT) messages.dropLast(1) else messages
        val last = asked.lastOrNull() ?: throw LordbaError("nothing was asked yet; write a message first")
        if (style == PromptStyle.CONTINUE) return fitting(tokenizer.encodePlain(last.text), longest)
        val turns = asked.map { turn(tokenizer, it.role.name.lowercase(), it.text) }
        val head = system?.let { turn(tokenizer, "system", it) } ?: IntArray(0)
        val tail = start(tokenizer, "assistant")
        var first = 0
        // A cut between user and assistant would leave an answer without its question.
        while (first < turns.lastIndex &&
            head.size + turns.drop(first).sumOf { it.size } + tail.size > longest
        ) {
            first += 2
        }
        return fitting(turns.drop(first).fold(head) { text, turn -> text + turn } + tail, longest)
    }

    private fun fitting(
        tokens: IntArray,
        longest: Int,
    ): IntArray {
        if (tokens.size <= longest) return tokens
        throw LordbaError("the message has ${tokens.size} tokens, of which the model takes $longest here; shorten it")
    }

    private fun start(
        tokenizer: Tokenizer,
        role: String,
    ) = intArrayOf(special(tokenizer, START)) + tokenizer.encodePlain("$role\n")

    // What the user types stays text: a typed <|im_end|> does not end a turn.
    private fun turn(
        tokenizer: Tokenizer,
        role: String,
        text: String,
    ) = intArrayOf(special(tokenizer, START)) + tokenizer.encodePlain("$role\n$text") +
        special(tokenizer, END) + tokenizer.encodePlain("\n")

    private fun special(
        tokenizer: Tokenizer,
        content: String,
    ) = tokenizer.idOf(content) ?: throw LordbaError("the tokenizer has no $content; set the style to CONTINUE")

    companion object {
        private const val START = "<|im_start|>"
        private const val END = "<|im_end|>"

        /** A new conversation in the style that the tokenizer allows. */
        fun start(tokenizer: Tokenizer): Chat {
            val chats = tokenizer.idOf(START) != null && tokenizer.idOf(END) != null
            return Chat(style = if (chats) PromptStyle.CHATML else PromptStyle.CONTINUE)
        }
    }
}
