package ai.lordba.demo.runtime

import ai.lordba.demo.core.AdapterBank
import ai.lordba.demo.core.Bundle
import ai.lordba.demo.core.StreamDecoder
import ai.lordba.demo.core.Tokenizer
import ai.lordba.demo.core.jsonObject
import ai.lordba.demo.core.loadAdapter
import java.io.File

/**
 * Continues a text greedily with one adapter after the other, all by what the app itself uses: tokenizer, bank, session,
 * stream. Prints a JSON object of token ids and text per adapter. `NAME=FOLDER` installs an adapter first.
 */
fun text(
    bundle: Bundle,
    prompt: String,
    maxNewTokens: Int,
    adapters: List<String>,
) {
    val tokenizer = Tokenizer.read(File(bundle.folder, bundle.manifest.tokenizer!!))
    AdapterBank(bundle, NativeRunners.open(bundle)).use { bank ->
        for (adapter in adapters) {
            val name = adapter.substringBefore('=')
            if ('=' in adapter) bank.install(name, loadAdapter(File(adapter.substringAfter('='))))
            val stream = StreamDecoder(tokenizer)
            val made =
                bank.use(name.takeIf { it != "none" }) { session ->
                    session.generate(tokenizer.encode(prompt), maxNewTokens) {
                        stream.add(it)
                        true
                    }
                }
            stream.finish()
            println(jsonObject("adapter" to name, "ids" to made.tokens.joinToString(" "), "text" to stream.text))
        }
    }
}
