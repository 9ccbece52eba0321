package ai.lordba.demo.runtime

import ai.lordba.demo.core.Adapter
import ai.lordba.demo.core.Bundle
import ai.lordba.demo.core.LoadedAdapter
import ai.lordba.demo.core.LordbaError
import ai.lordba.demo.core.Runner
import ai.lordba.demo.core.ScaleCode
import ai.lordba.demo.core.TrainingSettings
import ai.lordba.demo.core.blobFactors
import ai.lordba.demo.core.blobOf
import ai.lordba.demo.core.readBundle
import ai.lordba.demo.core.saveAdapter
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import kotlin.system.exitProcess

/**
 * What tests/test_android_native.py runs in a JVM, over the same native library as on the phone:
 *
 *     logits BUNDLE OUT PREFILL TOKENS ADAPTER...  one program, one adapter after the other; logits of every step
 *     text BUNDLE PROMPT N ADAPTER...              one bank, one adapter after the other; see RunText.kt
 *     mistakes BUNDLE                              what each mistake is answered with, a line each
 *     train BUNDLE START OUT STEPS SEED TOKENS     losses, a line each; half way it goes on from a checkpoint; packed to OUT
 *     memory BUNDLE                                bytes that many openings and closings left behind; what a watch sees
 */
fun main(arguments: Array<String>) {
    val bundle = readBundle(File(arguments[1]))
    when (arguments[0]) {
        "logits" -> logits(bundle, File(arguments[2]), arguments[3].toInt(), ids(arguments[4]), arguments.drop(5))
        "text" -> text(bundle, arguments[2], arguments[3].toInt(), arguments.drop(4))
        "mistakes" -> mistakes(bundle)
        "train" -> train(bundle, arguments.drop(2))
        "memory" -> memory(bundle)
        else -> exitProcess(2)
    }
}

private fun ids(text: String) = text.split(",").map { it.toInt() }.toIntArray()

private fun Runner.load(
    bundle: Bundle,
    name: String,
): LoadedAdapter = load(bundle.adapterFile(name.takeIf { it != "none" }))

private fun logits(
    bundle: Bundle,
    out: File,
    prefill: Int,
    tokens: IntArray,
    adapters: List<String>,
) {
    NativeRunners.open(bundle).use { runner ->
        val loaded = adapters.distinct().associateWith { runner.load(bundle, it) }
        out.outputStream().buffered().use { file ->
            for (adapter in adapters) {
                runner.use(loaded.getValue(adapter))
                val steps =
                    listOf(runner.run(tokens.copyOf(prefill), 0)) +
                        (prefill until tokens.size).map { runner.run(intArrayOf(tokens[it]), it) }
                steps.forEach { file.write(bytes(it)) }
            }
        }
        loaded.values.forEach { it.close() }
    }
}

private fun bytes(values: FloatArray): ByteArray {
    val buffer = ByteBuffer.allocate(4 * values.size).order(ByteOrder.LITTLE_ENDIAN)
    values.forEach { buffer.putFloat(it) }
    return buffer.array()
}

private fun tell(
    what: String,
    block: () -> Unit,
) {
    try {
        block()
        println("$what: nothing was thrown")
    } catch (error: LordbaError) {
        println("$what: ${error.message}")
    }
}

private fun mistakes(bundle: Bundle) {
    fun changed(change: Bundle.() -> Bundle) = NativeRunners.open(bundle.change()).close()
    tell("missing") { changed { copy(folder = File("/nirgendwo/Üß漢😀")) } }
    tell("operator") { changed { copy(manifest = manifest.copy(requires = listOf("lordba::no.out", "aten::no.out"))) } }
    tell("mode") { changed { copy(manifest = manifest.copy(adapterMode = "ptd")) } }
    tell("target") { changed { copy(manifest = manifest.copy(target = "coreml")) } }
    tell("threads") { NativeRunners.open(bundle, -1) }
    tell("not a program") { changed { copy(manifest = manifest.copy(program = "manifest.json")) } }
    val runner = NativeRunners.open(bundle)
    tell("too early") { runner.run(intArrayOf(5), 0) }
    tell("no file") { runner.load(null) }
    tell("missing file") { runner.load(File("/nirgendwo")) }
    val adapter = runner.load(bundle, "north")
    runner.use(adapter)
    tell("token") { runner.run(intArrayOf(5, 1000000), 0) }
    tell("negative token") { runner.run(intArrayOf(-1), 0) }
    tell("no token") { runner.run(IntArray(0), 0) }
    tell("too many tokens") { runner.run(IntArray(runner.longest + 1) { 5 }, 0) }
    tell("too far") { runner.run(intArrayOf(5), Int.MAX_VALUE) }
    tell("negative start") { runner.run(intArrayOf(5), -1) }
    val damaged = File.createTempFile("damaged", ".blob").apply { writeBytes(ByteArray(64)) }
    runner.use(runner.load(damaged))
    tell("damaged") { runner.run(intArrayOf(5), 0) }
    damaged.delete()
    runner.use(adapter)
    adapter.close()
    adapter.close()
    println("in use after its owner closed it: ${runner.run(intArrayOf(5), 0).size} logits")
    tell("closed adapter") { runner.use(adapter) }
    tell("strange adapter") {
        runner.use(
            object : LoadedAdapter {
                override fun close() = Unit
            },
        )
    }
    tell("many files") { ExecuTorch.openProgram("nowhere", Array(20000) { "lordba::no$it.out" }, 0) }
    runner.close()
    runner.close()
    tell("closed") { runner.run(intArrayOf(5), 0) }
}

private fun train(
    bundle: Bundle,
    arguments: List<String>,
) {
    val (start, out, steps, seed, tokens) = arguments
    NativeTrainers.whyNot(bundle)?.let { throw LordbaError(it) }
    val factors = if (start == "none") null else blobFactors(blobOf(bundle.adapterFile(start)!!))
    val settings = TrainingSettings(learningRate = 0.02f, seed = seed.toLong())
    val checkpoint = File("$out.checkpoint")
    NativeTrainers.open(bundle, factors, settings).use { trainer ->
        repeat(steps.toInt() / 2) { println(trainer.step(ids(tokens))) }
        trainer.save(checkpoint, NOTE)
    }
    NativeTrainers.open(bundle, null, settings).use { trainer ->
        check(trainer.load(checkpoint) == NOTE)
        repeat(steps.toInt() - steps.toInt() / 2) { println(trainer.step(ids(tokens))) }
        saveAdapter(Adapter(trainer.pack(), ScaleCode.LOG4, null, bundle.manifest.fingerprint), File(out))
        tell("mistake") { trainer.step(intArrayOf(5)) }
        tell("mistake") { trainer.step(intArrayOf(5, -1)) }
        tell("mistake") { trainer.load(File("/nirgendwo")) }
    }
}

private const val NOTE = "bis hierher 漢😀"

private fun memory(bundle: Bundle) {
    fun round() =
        NativeRunners.open(bundle).use { runner ->
            val adapter = runner.load(bundle, "north")
            runner.use(adapter)
            runner.run(intArrayOf(5, 6, 7), 0)
            adapter.close()
        }

    fun resident(): Long = PeakMemory().use { it.stop() }
    repeat(20) { round() }
    val before = resident()
    repeat(200) { round() }
    println("left behind: ${resident() - before}")
    val watch = PeakMemory()
    val start = resident()
    val memory = ByteBuffer.allocateDirect(64 shl 20)
    for (i in 0 until memory.capacity() step 4096) memory.put(i, 1)
    Thread.sleep(20)
    println("seen: ${watch.stop() - start} of ${memory.capacity()}")
}
