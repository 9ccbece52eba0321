package ai.lordba.demo.core

/** One loaded program with its KV cache and the adapter in use; what `Session` of lordba/runtime/session.py is. */
class Session(
    private val bundle: Bundle,
    private val runner: Runner,
    cached: IntArray = IntArray(0),
) {
    val maxSeqLen: Int get() = bundle.manifest.maxSeqLen

    /** The tokens in the KV cache. */
    var cached: IntArray = cached
        private set

    /** Forgets the text so far; the cache is overwritten from the start. */
    fun reset() {
        cached = IntArray(0)
    }

    /** Appends tokens to the text and returns the logits [vocabulary] of what comes next. */
    fun feed(tokens: IntArray): FloatArray {
        if (tokens.isEmpty() || cached.size + tokens.size > maxSeqLen) {
            throw LordbaError(
                "${tokens.size} tokens after ${cached.size} do not fit the program, which was exported for " +
                    "$maxSeqLen; shorten the text or export with a larger --max-seq-len",
            )
        }
        var logits = FloatArray(0)
        for (begin in tokens.indices step runner.longest) {
            val part = tokens.copyOfRange(begin, minOf(begin + runner.longest, tokens.size))
            val before = cached
            cached = IntArray(0) // should the run fail half way
            logits = runner.run(part, before.size)
            cached = before + part
        }
        return logits
    }

    /**
     * Continues a text, token by token, until an end token, the end of the cache, or until [onToken] returns false.
     *
     * What the KV cache holds of the text already is not run again. Returns the new tokens, and how long it took.
     */
    fun generate(
        prompt: IntArray,
        maxNewTokens: Int,
        sampling: Sampling = Sampling(),
        random: () -> Double = Math::random,
        clock: Clock = Clock.System,
        onToken: (Int) -> Boolean = { true },
    ): Generated {
        if (prompt.isEmpty()) throw LordbaError("the text is empty; give some text to continue")
        val known = if (startsWith(prompt, cached) && cached.size < prompt.size) cached.size else 0
        if (known == 0) cached = IntArray(0)
        val begun = clock.nanoTime()
        var logits = feed(prompt.copyOfRange(known, prompt.size))
        val prefilled = clock.nanoTime()
        val made = ArrayList<Int>()
        while (made.size < maxNewTokens) {
            val token = sample(logits, sampling, random())
            if (token in bundle.manifest.eosIds) break
            made.add(token)
            if (!onToken(token) || made.size == maxNewTokens || cached.size >= maxSeqLen) break
            logits = feed(intArrayOf(token))
        }
        return Generated(made, prompt.size - known, prefilled - begun, clock.nanoTime() - prefilled)
    }

    private fun startsWith(
        text: IntArray,
        start: IntArray,
    ) = text.size >= start.size && start.indices.all { text[it] == start[it] }
}

/** What was generated, after so many tokens of prefill, and the nanoseconds of both. */
data class Generated(
    val tokens: List<Int>,
    val prefillTokens: Int,
    val prefillNanos: Long,
    val decodeNanos: Long,
) {
    /** Tokens per second after the first one, which the prefill gives; null with fewer than two. */
    val tokensPerSecond: Double? get() = if (tokens.size < 2) null else (tokens.size - 1) * 1e9 / decodeNanos
}

/** The time that durations are taken from. */
fun interface Clock {
    fun nanoTime(): Long

    companion object {
        val System = Clock { java.lang.System.nanoTime() }
    }
}

/** Turns tokens into text as they come; holds back a character until all of its bytes are there. */
class StreamDecoder(
    private val tokenizer: Tokenizer,
) {
    private val pending = ArrayList<Int>()
    private val shown = StringBuilder()

    /** All text so far. */
    val text: String get() = shown.toString()

    /** Adds a token; returns the text that it completes, which may be empty. */
    fun add(token: Int): String {
        pending.add(token)
        val piece = tokenizer.decode(pending)
        return if (piece.endsWith(REPLACEMENT) && pending.size < LONGEST_CHARACTER) "" else show(piece)
    }

    /** What was held back, should the text end inside a character. */
    fun finish(): String = show(tokenizer.decode(pending))

    private fun show(piece: String): String {
        pending.clear()
        shown.append(piece)
        return piece
    }

    private companion object {
        const val REPLACEMENT = '\uFFFD'
        const val LONGEST_CHARACTER = 4 // bytes, and so tokens, of a character in UTF-8
    }
}
