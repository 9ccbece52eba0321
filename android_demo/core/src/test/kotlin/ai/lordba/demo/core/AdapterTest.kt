package ai.lordba.demo.core

import com.google.gson.JsonObject
import org.junit.Test
import java.io.File
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals
import kotlin.test.assertNotEquals
import kotlin.test.assertTrue

class AdapterTest {
    private val values = Golden.json("values.json")

    @Test
    fun `signs and scales of every code are those of the golden values`() {
        for (code in ScaleCode.values()) {
            val adapter = loadAdapter(Golden.file("adapter-${code.id}"))
            assertEquals(values.keySet(), adapter.modules.keys)
            for ((path, module) in adapter.modules) {
                val expected = values.nested(path)
                assertSigns(expected.list("a").map { it.asString }, module.aSigns)
                assertSigns(expected.list("b").map { it.asString }, module.bSigns)
                val stored = expected.nested("stored").nested(code.id)
                for ((name, scales) in listOf("in", "mid", "out").zip(module.scales)) {
                    assertContentEquals(stored.get(name).floats(), scales.decode(), "$code $path $name")
                }
            }
        }
    }

    @Test
    fun `blobs are Python's byte for byte, also when padded`() {
        for (code in ScaleCode.values()) {
            val modules = loadAdapter(Golden.file("adapter-${code.id}")).modules.values.toList()
            val expected = Golden.file("blob-${code.id}.bin").readBytes()
            assertContentEquals(expected, makeBlob(modules + null))
            assertContentEquals(expected + ByteArray(7), makeBlob(modules + null, expected.size + 7))
            assertNotEquals(expected.toList(), makeBlob(modules.reversed() + null).toList())
            assertEquals(listOf(13 to 10, 8 to 9, null), blobSizes(expected))
            assertRefused("does not fit") { makeBlob(modules + null, expected.size - 1) }
        }
    }

    @Test
    fun `an adapter is written as Python writes it, byte for byte`() {
        for (folder in ScaleCode.values().map { "adapter-${it.id}" } + "demo/model/adapter") {
            val copy = File(Golden.scratch(), "copy")
            saveAdapter(loadAdapter(Golden.file(folder)), copy)
            for (name in listOf(CONFIG_NAME, WEIGHTS_NAME)) {
                assertContentEquals(
                    Golden.file("$folder/$name").readBytes(),
                    File(copy, name).readBytes(),
                    "$folder $name",
                )
            }
            assertRefused("exists already") { saveAdapter(loadAdapter(copy), copy) }
        }
    }

    @Test
    fun `sizes are exact`() {
        val adapter = loadAdapter(Golden.file("adapter-log4"))
        val entry = readBundle(Golden.file("demo/bundle")).adapter("golden")
        assertEquals(entry.bytes, adapter.bytes)
        assertEquals(entry.fp16LoraBytes, adapter.fp16LoraBytes)
        assertEquals(entry.r, adapter.r)
        assertEquals(8.0 * 116 / 358, adapter.bitsPerWeight)
    }

    @Test
    fun `damaged folders are refused by name`() {
        refused("truncated or damaged") { it.writeBytes(it.readBytes().let { raw -> raw.copyOf(raw.size - 1) }) }
        refused("truncated or damaged") { it.writeBytes(ByteArray(4)) }
        refused("truncated or damaged") { it.writeBytes(it.readBytes().also { raw -> raw[6] = 1 }) }
        refused("padding bits", "lordba_A.signs") { file -> edit(file, "U8") { it[1] = 0xff.toByte() } }
        refused("the range must be") { file -> edit(file, "F16") { it[1] = 0x80.toByte() } }
        refused("missing", "layers.1.proj.lordba_A") { replace(it, "layers.1.proj.lordba", "layers.9.proj.lordba") }
        refused("format=lordba") { replace(it, "\"format\":\"lordba\"", "\"format\":\"lordbb\"") }
        refused("U8 [3, 2]") { replace(it, "[3,2]", "[2,3]") }
        refused("shapes metadata", "d_in") { replace(it, "d_in", "d_on") }
    }

    @Test
    fun `another kind or version of adapter is refused with what to do`() {
        configRefused("lordba.convert") { it.addProperty("peft_type", "LORA") }
        configRefused("format_version 2") { it.addProperty("format_version", 2) }
        configRefused("scale_code", "log5") { it.addProperty("scale_code", "log5") }
        configRefused("in training") { it.apply { remove("format_version") }.addProperty("lora_alpha", 16) }
    }

    @Test
    fun `halves are exact`() {
        for ((bits, value) in mapOf(
            0x3c00 to 1f,
            0x0001 to 5.9604645e-8f,
            0x7bff to 65504f,
            0xc000 to -2f,
            0x7c00 to Float.POSITIVE_INFINITY,
        )) {
            assertEquals(value, halfToFloat(bits.toShort()))
        }
        assertTrue(halfToFloat(0x7e00).isNaN())
    }

    private fun assertSigns(
        expected: List<String>,
        packed: RawTensor,
    ) {
        val found =
            expected.indices.map { row ->
                expected[row].indices.joinToString("") {
                    if (packed.sign(row, it) <
                        0
                    ) {
                        "-"
                    } else {
                        "+"
                    }
                }
            }
        assertEquals(expected, found)
    }

    private fun refused(
        vararg words: String,
        damage: (File) -> Unit,
    ) {
        val folder = File(Golden.scratch(), "adapter")
        Golden.file("adapter-log4").copyRecursively(folder)
        damage(File(folder, WEIGHTS_NAME))
        assertRefused(WEIGHTS_NAME, *words) { loadAdapter(folder) }
    }

    private fun configRefused(
        vararg words: String,
        edit: (JsonObject) -> Unit,
    ) {
        val folder = File(Golden.scratch(), "adapter")
        Golden.file("adapter-log4").copyRecursively(folder)
        val file = File(folder, CONFIG_NAME)
        file.writeText(parseJsonObject(file).also(edit).toText(2))
        assertRefused(CONFIG_NAME, *words) { loadAdapter(folder) }
    }

    /** Changes the data of the first tensor of a type. */
    private fun edit(
        file: File,
        dtype: String,
        change: (ByteArray) -> Unit,
    ) {
        val stored = readSafetensors(file)
        change(
            stored.tensors
                .filterValues { it.dtype.name == dtype }
                .toSortedMap()
                .values
                .first()
                .data,
        )
        file.writeBytes(safetensorsBytes(stored.tensors, stored.metadata))
    }

    private fun replace(
        file: File,
        old: String,
        new: String,
    ) {
        val text = file.readText(Charsets.ISO_8859_1)
        assertTrue(old in text)
        file.writeText(text.replace(old, new), Charsets.ISO_8859_1)
    }
}
