package ai.lordba.demo.core

import com.google.gson.JsonArray
import com.google.gson.JsonElement
import com.google.gson.JsonObject
import java.io.File
import java.nio.file.Files
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

/** Files that Python wrote and reads back: the system property `lordba.golden` names the folder tests/golden. */
object Golden {
    private val root = File(checkNotNull(System.getProperty("lordba.golden")) { "set -Dlordba.golden=tests/golden" })

    fun file(path: String): File = File(root, path).also { assertTrue(it.exists(), "$it is missing") }

    fun objects(path: String): List<JsonObject> =
        (parseJson(file(path).readText()) as JsonArray).map { it as JsonObject }

    fun json(path: String): JsonObject = parseJsonObject(file(path))

    /** A copy of the golden bundle that a test may change. */
    fun bundle(): File =
        scratch().let {
            file("demo/bundle").copyRecursively(File(it, "bundle")).let { _ ->
                File(it, "bundle")
            }
        }

    /** A new folder that goes when the tests end. */
    fun scratch(): File =
        Files.createTempDirectory("lordba").toFile().also {
            Runtime.getRuntime().addShutdownHook(Thread { it.deleteRecursively() })
        }
}

fun JsonElement.ints(): IntArray = asJsonArray.map { it.asInt }.toIntArray()

fun JsonElement.floats(): FloatArray = asJsonArray.map { it.asFloat }.toFloatArray()

/** Asserts that [block] refuses with a message that holds all of these words. */
fun assertRefused(
    vararg words: String,
    block: () -> Unit,
) {
    val message = assertFailsWith<LordbaError> { block() }.message.orEmpty()
    for (word in words) assertTrue(word in message, "\"$message\" does not say \"$word\"")
}
