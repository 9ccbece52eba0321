package ai.lordba.demo.core

import com.google.gson.JsonElement
import com.google.gson.JsonObject
import java.io.File

/** Text to token ids and back, as a bundle's tokenizer.json says: byte-level BPE. Threads may share it. */
class Tokenizer private constructor(
    private val bpe: Bpe,
    private val splitter: Regex,
    private val individualDigits: Boolean,
    private val added: Map<String, Int>,
    private val special: Set<Int>,
) {
    private val contents: Map<Int, String> = added.entries.associate { (content, id) -> id to content }
    private val addedPattern: Regex? =
        added.keys.sortedByDescending { it.length }.takeIf { it.isNotEmpty() }?.let { all ->
            Regex(all.joinToString("|") { Regex.escape(it) })
        }

    /** The id of a token that stands for itself, such as <|im_end|>, or null. */
    fun idOf(content: String): Int? = added[content]

    /** Token ids of a text; tokens written out in it, such as <|im_end|>, become themselves. */
    fun encode(text: String): IntArray {
        val ids = ArrayList<Int>()
        var end = 0
        for (match in addedPattern?.findAll(text).orEmpty()) {
            encodePlain(text.substring(end, match.range.first), ids)
            ids.add(added.getValue(match.value))
            end = match.range.last + 1
        }
        encodePlain(text.substring(end), ids)
        return ids.toIntArray()
    }

    /** Token ids of a text in which nothing stands for a special token: what a user types stays text. */
    fun encodePlain(text: String): IntArray = ArrayList<Int>().also { encodePlain(text, it) }.toIntArray()

    private fun encodePlain(
        text: String,
        ids: MutableList<Int>,
    ) {
        val pieces = if (individualDigits) DIGIT.pieces(text) else sequenceOf(text)
        pieces.flatMap { splitter.findAll(it) }.forEach { bpe.encode(ByteAlphabet.encode(it.value), ids) }
    }

    /** The text of token ids, without special tokens; bytes that are no UTF-8 become U+FFFD. */
    fun decode(
        ids: List<Int>,
        skipSpecial: Boolean = true,
    ): String {
        val bytes = java.io.ByteArrayOutputStream()
        for (id in ids) {
            if (skipSpecial && id in special) continue
            val token = contents[id]?.toByteArray(Charsets.UTF_8) ?: bpe.token(id)?.let(ByteAlphabet::decode)
            if (token != null) bytes.write(token, 0, token.size)
        }
        return String(bytes.toByteArray(), Charsets.UTF_8)
    }

    companion object {
        /** Reads tokenizer.json; throws [LordbaError] for a kind that is not byte-level BPE as here. */
        fun read(file: File): Tokenizer =
            try {
                of(parseJsonObject(file))
            } catch (error: JsonShapeError) {
                throw LordbaError(
                    "$file: is no tokenizer that this app reads (${error.message}); it reads byte-level BPE, as of SmolLM2 and GPT-2",
                    error,
                )
            }

        private fun of(json: JsonObject): Tokenizer {
            if (!json.need("normalizer").isJsonNull) throw JsonShapeError("it has a normalizer")
            checkPostProcessor(json.need("post_processor"))
            if (typeOf(json.need("decoder")) != "ByteLevel") throw JsonShapeError("its decoder is not ByteLevel")
            val tokens = json.objects("added_tokens")
            for (token in tokens) {
                if (listOf("single_word", "lstrip", "rstrip", "normalized").any { token.boolean(it) }) {
                    throw JsonShapeError("its token ${token.string("content")} also takes what stands around it")
                }
            }
            val (splitter, digits) = splitterOf(json.need("pre_tokenizer"))
            return Tokenizer(
                Bpe.of(json.nested("model")),
                splitter,
                digits,
                tokens.associate { it.string("content") to it.int("id") },
                tokens.filter { it.boolean("special") }.map { it.int("id") }.toSet(),
            )
        }

        /** A template may not add tokens to a text. */
        private fun checkPostProcessor(json: JsonElement) {
            if (json.isJsonNull || typeOf(json) == "ByteLevel") return
            val parts =
                if (typeOf(json) ==
                    "TemplateProcessing"
                ) {
                    (json as JsonObject).objects("single")
                } else {
                    emptyList()
                }
            if (parts.size != 1 || !parts[0].has("Sequence")) throw JsonShapeError("it has a ${typeOf(json)}")
        }

        /** The pattern that cuts text into words, and whether digits are cut apart before. */
        private fun splitterOf(json: JsonElement): Pair<Regex, Boolean> {
            val parts = if (typeOf(json) == "Sequence") (json as JsonObject).objects("pretokenizers") else listOf(json)
            val (byteLevel, before) = parts.map { it as JsonObject }.partition { typeOf(it) == "ByteLevel" }
            if (byteLevel.size != 1 || byteLevel[0].boolean("add_prefix_space")) {
                throw JsonShapeError("its pre-tokenizer is not one ByteLevel without a space before the text")
            }
            val digits = before.filter { typeOf(it) == "Digits" && it.boolean("individual_digits") }
            if (digits.size != before.size) throw JsonShapeError("its pre-tokenizer has ${before.map { typeOf(it) }}")
            if (!byteLevel[0].boolean("use_regex")) throw JsonShapeError("its ByteLevel does not cut words")
            return WORDS to digits.isNotEmpty()
        }

        private fun typeOf(json: JsonElement): String =
            (json as? JsonObject ?: throw JsonShapeError("its parts have no type")).string("type")

        // Written out, for \s is ASCII in Java and Unicode on Android.
        private const val SPACE = "\\t-\\r \\u0085\\u00a0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000"
        private val WORDS =
            Regex(
                "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^$SPACE\\p{L}\\p{N}]+|[$SPACE]+(?![^$SPACE])|[$SPACE]+",
            )
        private val DIGIT = Regex("\\p{N}")
    }
}

/** The text cut into what matches and what stands between. */
private fun Regex.pieces(text: String): Sequence<String> =
    sequence {
        var end = 0
        for (match in findAll(text)) {
            if (match.range.first > end) yield(text.substring(end, match.range.first))
            yield(match.value)
            end = match.range.last + 1
        }
        if (end < text.length) yield(text.substring(end))
    }

/** GPT-2's alphabet: a printable character for each byte. */
private object ByteAlphabet {
    private val printable = (33..126) + (161..172) + (174..255)
    private val characters: CharArray =
        CharArray(256).also { characters ->
            printable.forEach { characters[it] = it.toChar() }
            ((0..255) - printable.toSet()).forEachIndexed { i, byte -> characters[byte] = (256 + i).toChar() }
        }
    private val bytes: Map<Char, Byte> =
        characters.withIndex().associate { (byte, character) ->
            character to
                byte.toByte()
        }

    fun encode(text: String): String =
        text.toByteArray(Charsets.UTF_8).joinToString("") { characters[it.toInt() and 0xff].toString() }

    /** A token's bytes; a token with other characters stands for its own text. */
    fun decode(token: String): ByteArray {
        if (token.any { it !in bytes }) return token.toByteArray(Charsets.UTF_8)
        return ByteArray(token.length) { bytes.getValue(token[it]) }
    }
}

/** Byte-pair encoding of one word at a time. */
private class Bpe(
    private val vocabulary: Map<String, Int>,
    private val ranks: Map<Long, Merge>,
    private val ignoreMerges: Boolean,
) {
    class Merge(
        val rank: Int,
        val id: Int,
    )

    private val tokens: Map<Int, String> = vocabulary.entries.associate { (token, id) -> id to token }

    fun token(id: Int): String? = tokens[id]

    fun encode(
        word: String,
        ids: MutableList<Int>,
    ) {
        val whole = vocabulary[word]
        if (ignoreMerges && whole != null) {
            ids.add(whole)
            return
        }
        val parts = word.mapTo(ArrayList(word.length)) { vocabulary[it.toString()] ?: return@mapTo -1 }
        while (parts.size > 1) {
            val at = (0 until parts.size - 1).minByOrNull { rank(parts, it) }!!
            if (rank(parts, at) == Int.MAX_VALUE) break
            parts[at] = ranks.getValue(pair(parts[at], parts[at + 1])).id
            parts.removeAt(at + 1)
        }
        parts.filterTo(ids) { it >= 0 } // a byte that no token stands for is left out, as tokenizers does
    }

    private fun rank(
        parts: List<Int>,
        at: Int,
    ): Int = ranks[pair(parts[at], parts[at + 1])]?.rank ?: Int.MAX_VALUE

    companion object {
        private fun pair(
            left: Int,
            right: Int,
        ): Long = left.toLong() shl 32 or (right.toLong() and 0xffffffffL)

        fun of(json: JsonObject): Bpe {
            if (json.string("type") != "BPE") throw JsonShapeError("its model is ${json.string("type")}")
            for (key in listOf("unk_token", "continuing_subword_prefix", "end_of_word_suffix", "dropout")) {
                val value = json.get(key)
                if (value != null && !value.isJsonNull &&
                    value.toString() != "\"\""
                ) {
                    throw JsonShapeError("it has a $key")
                }
            }
            if (json.get("byte_fallback")?.asBoolean == true) throw JsonShapeError("it has byte_fallback")
            val vocabulary = HashMap<String, Int>()
            json.nested("vocab").entrySet().forEach { (token, id) -> vocabulary[token] = id.asWhole(token).toInt() }
            val ranks = HashMap<Long, Merge>()
            json.list("merges").forEachIndexed { rank, merge ->
                val (left, right) =
                    if (merge.isJsonArray) {
                        merge.asJsonArray.map { it.asString }
                    } else {
                        merge.asString
                            .split(
                                " ",
                            )
                    }

                fun id(token: String) = vocabulary[token] ?: throw JsonShapeError("its merge $rank makes no token")
                ranks[pair(id(left), id(right))] = Merge(rank, id(left + right))
            }
            return Bpe(vocabulary, ranks, json.get("ignore_merges")?.asBoolean == true)
        }
    }
}
