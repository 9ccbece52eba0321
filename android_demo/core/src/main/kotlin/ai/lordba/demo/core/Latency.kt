package ai.lordba.demo.core

/** What to measure, and how often; [adapters] are measured beside the base alone. */
data class LatencyPlan(
    val adapters: List<String>,
    val prefillTokens: Int = 128,
    val decodeTokens: Int = 32,
    val rounds: Int = 10,
    val warmUp: Int = 2,
    val threads: Int = 0,
)

/**
 * Measures swap, prefill and decode of a bundle with each adapter and without, in turn, so that heat and clocks touch
 * all alike; what `python -m lordba.profile` does.
 *
 * Every decoded token is one sample. [onRound] hears of each round done and returns false to end early. The tokens are
 * arbitrary: latency does not depend on them.
 */
class LatencyRun(
    private val bank: AdapterBank,
    private val plan: LatencyPlan,
    private val clock: Clock = Clock.System,
) {
    private val samples = LinkedHashMap<Pair<String?, String>, MutableList<Double>>()

    fun run(onRound: (Int, Int) -> Boolean): List<Series> {
        val tokens = checkedTokens()
        val variants = listOf(null) + plan.adapters
        for (round in 1..plan.warmUp + plan.rounds) {
            for (variant in variants) measure(variant, tokens, keep = round > plan.warmUp)
            if (!onRound(round, plan.warmUp + plan.rounds)) break
        }
        return samples.map { (key, values) -> series(key.first, key.second, values) }
    }

    private fun checkedTokens(): IntArray {
        val longest = bank.bundle.manifest.maxSeqLen
        if (plan.prefillTokens < 1 || plan.prefillTokens + plan.decodeTokens > longest) {
            throw LordbaError(
                "${plan.prefillTokens} tokens and ${plan.decodeTokens} more do not fit the program, which was " +
                    "exported for $longest; measure fewer or export with a larger --max-seq-len",
            )
        }
        val forbidden =
            bank.bundle.manifest.eosIds
                .toSet()
        return (0 until plan.prefillTokens + 1 + forbidden.size)
            .filter { it !in forbidden }
            .take(plan.prefillTokens)
            .toIntArray()
    }

    private fun measure(
        variant: String?,
        tokens: IntArray,
        keep: Boolean,
    ) {
        val begun = clock.nanoTime()
        bank.use(variant) { session ->
            val swapped = clock.nanoTime()
            session.reset()
            var logits = session.feed(tokens)
            val prefilled = clock.nanoTime()
            if (keep) {
                add(variant, "swap", swapped - begun)
                add(variant, "prefill", prefilled - swapped)
            }
            repeat(plan.decodeTokens) {
                val started = clock.nanoTime()
                logits = session.feed(intArrayOf(argmax(logits)))
                if (keep) add(variant, "decode", clock.nanoTime() - started)
            }
        }
    }

    private fun add(
        variant: String?,
        phase: String,
        nanos: Long,
    ) {
        samples.getOrPut(variant to phase) { ArrayList() }.add(nanos / 1e6)
    }

    private fun series(
        variant: String?,
        phase: String,
        values: List<Double>,
    ): Series {
        val manifest = bank.bundle.manifest
        val entry = variant?.let { bank.bundle.adapter(it) }
        return Series(
            target = manifest.target,
            model = manifest.baseName,
            baseQuant = manifest.baseQuant,
            adapter = if (entry == null) "none" else "lordba",
            phase = phase,
            tokens = mapOf("prefill" to plan.prefillTokens, "decode" to 1)[phase] ?: 0,
            threads = plan.threads,
            samples = values,
            adapterName = entry?.name,
            rank = entry?.r,
            bits = entry?.let { 8.0 * it.bytes / (it.fp16LoraBytes / 2.0) },
            scaleCode = entry?.scaleCode,
        )
    }
}
