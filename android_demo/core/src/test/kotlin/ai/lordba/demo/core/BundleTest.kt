package ai.lordba.demo.core

import com.google.gson.JsonObject
import org.junit.Test
import java.io.File
import kotlin.test.assertEquals
import kotlin.test.assertFalse
import kotlin.test.assertNull
import kotlin.test.assertTrue

class BundleTest {
    @Test
    fun `the golden bundle is whole and says what it holds`() {
        val heard = ArrayList<Long>()
        val bundle = readBundle(Golden.file("demo/bundle")) { done, total -> heard.add(total - done) }
        assertEquals("executorch", bundle.manifest.target)
        assertEquals("golden-base", bundle.manifest.baseName)
        assertEquals(listOf(0, 2), bundle.manifest.eosIds)
        assertEquals(653, bundle.adapterFile("golden")!!.length())
        assertNull(bundle.adapterFile(null))
        assertEquals(0L, heard.last())
        assertRefused("holds no adapter 'other'", "golden, none") { bundle.adapterFile("other") }
    }

    @Test
    fun `every damage is refused with the words that Python uses`() {
        val damages = Golden.objects("demo/bundle-damaged.json")
        assertTrue(damages.size >= 6)
        for (damage in damages) {
            val folder = Golden.bundle()
            damage(folder, damage)
            assertRefused(*damage.list("error").map { it.asString }.toTypedArray()) { readBundle(folder) }
        }
    }

    @Test
    fun `a file outside the bundle is refused even if it is listed and right`() {
        val folder = Golden.bundle()
        File(folder.parentFile, "outside.bin").writeBytes(File(folder, "model.bin").readBytes())
        change(folder) { record ->
            record
                .list("files")
                .map { it as JsonObject }
                .first { it.string("path") == "model.bin" }
                .addProperty("path", "../outside.bin")
            record.addProperty("program", "../outside.bin")
        }
        assertRefused("outside the bundle", "../outside.bin") { readBundle(folder) }
    }

    @Test
    fun `no manifest, or one that is no JSON, says so`() {
        assertRefused("not found", "python -m lordba.export") { readBundle(Golden.scratch()) }
        val folder = Golden.bundle()
        File(folder, MANIFEST_NAME).appendText("}")
        assertRefused("not a readable manifest") { readBundle(folder) }
        File(folder, MANIFEST_NAME).writeText("[1]")
        assertRefused("not a readable manifest") { readBundle(folder) }
    }

    @Test
    fun `names that would leave the folder or mean the base alone are no adapter names`() {
        for (name in listOf("mine", "a-b_c.2", "Ærø")) assertTrue(isAdapterName(name), name)
        for (name in listOf("", "none", ".hidden", "-x", "a/b", "..", "a b")) assertFalse(isAdapterName(name), name)
    }

    @Test
    fun `the store lists bundles, says what is wrong with others, and deletes`() {
        val root = Golden.scratch()
        Golden.file("demo/bundle").copyRecursively(File(root, "good"))
        Golden.file("demo/bundle").copyRecursively(File(root, "apple"))
        change(File(root, "apple")) { it.addProperty("target", "coreml") }
        File(root, "no-bundle").mkdirs()
        val store = BundleStore(listOf(root, File(root, "absent")))
        val listed = store.list()
        assertEquals(listOf("apple", "good"), listed.map { it.folder.name })
        assertTrue("--android" in listed[0].problem!!)
        assertNull(listed[1].problem)
        assertEquals(653L + 64 + 14218, listed[1].bytes)
        store.delete(listed[1])
        assertEquals(listOf("apple"), store.list().map { it.folder.name })
    }

    private fun damage(
        folder: File,
        damage: JsonObject,
    ) {
        val file = damage.get("file")?.let { File(folder, it.asString) }
        when (damage.string("kind")) {
            "flip_byte" -> {
                file!!.writeBytes(
                    file.readBytes().also {
                        it[it.size / 2] =
                            (it[it.size / 2].toInt() xor 1).toByte()
                    },
                )
            }

            "truncate" -> {
                file!!.writeBytes(file.readBytes().let { it.copyOf(it.size - 1) })
            }

            "remove" -> {
                assertTrue(file!!.delete())
            }

            "manifest" -> {
                change(folder) { record ->
                    damage.getAsJsonObject("set")?.entrySet()?.forEach { (key, value) -> record.add(key, value) }
                    damage.get("remove")?.let { record.remove(it.asString) }
                }
            }

            else -> {
                error("unknown damage $damage")
            }
        }
    }

    private fun change(
        folder: File,
        edit: (JsonObject) -> Unit,
    ) {
        val file = File(folder, MANIFEST_NAME)
        file.writeText(parseJsonObject(file).also(edit).toText(2))
    }
}
