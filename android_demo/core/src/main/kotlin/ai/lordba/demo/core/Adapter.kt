package ai.lordba.demo.core

import com.google.gson.JsonArray
import com.google.gson.JsonObject
import com.google.gson.JsonPrimitive
import java.io.File

const val CONFIG_NAME = "adapter_config.json"
const val WEIGHTS_NAME = "adapter_model.safetensors"
private const val PREFIX = "base_model.model."
private val SCALE_NAMES = listOf("in", "mid", "out")

/** Bytes that hold n signs. */
fun packedWidth(n: Int): Int = (n + 7) / 8

/**
 * The adapter of one linear layer: A uint8 [r, ceil(d_in/8)], B uint8 [d_out, ceil(r/8)], and s_in [d_in], s_mid [r],
 * s_out [d_out] as stored.
 */
class SignModule(
    val aSigns: RawTensor,
    val bSigns: RawTensor,
    val sIn: EncodedScales,
    val sMid: EncodedScales,
    val sOut: EncodedScales,
) {
    val r: Int get() = sMid.n
    val dIn: Int get() = sIn.n
    val dOut: Int get() = sOut.n
    val scales: List<EncodedScales> get() = listOf(sIn, sMid, sOut)

    /** Stored bytes: signs, scales and their ranges. */
    val bytes: Int get() = aSigns.data.size + bSigns.data.size + scales.sumOf { it.bytes }
}

/** Sign modules by their path in the base model, and what the adapter says of itself; [config] is its JSON. */
class Adapter(
    val modules: Map<String, SignModule>,
    val scaleCode: ScaleCode,
    val baseName: String?,
    val baseFingerprint: String?,
    val config: JsonObject = JsonObject(),
) {
    /** The largest rank of any module. */
    val r: Int get() = modules.values.maxOf { it.r }
    val bytes: Long get() = modules.values.sumOf { it.bytes.toLong() }

    /** Bytes of an fp16 LoRA with the same ranks and modules. */
    val fp16LoraBytes: Long get() = modules.values.sumOf { 2L * it.r * (it.dIn + it.dOut) }

    /** Exact stored bits per element of A and B. */
    val bitsPerWeight: Double get() = 8.0 * bytes / (fp16LoraBytes / 2.0)
}

/** One sign of a packed row: bit 1 is -1. */
fun RawTensor.sign(
    row: Int,
    column: Int,
): Int = if (data[row * shape[1] + column / 8].toInt() shr (column % 8) and 1 == 1) -1 else 1

/** Reads and checks an adapter folder; every deviation from the format is a [LordbaError] that names it. */
fun loadAdapter(folder: File): Adapter {
    val config = readConfig(File(folder, CONFIG_NAME))
    val code = ScaleCode.of(config.string("scale_code"))!!
    val file = File(folder, WEIGHTS_NAME)
    if (!file.isFile) throw missing(file)
    val stored = readSafetensors(file)
    val left = stored.tensors.toMutableMap()
    val modules =
        readShapes(stored.metadata, file).entries.associate { (key, shape) ->
            key.removePrefix(PREFIX) to ModuleReader(file, key, code, left).read(shape)
        }
    if (left.isNotEmpty()) {
        throw LordbaError("$file: unexpected tensor '${left.keys.min()}' that its shapes metadata does not list")
    }
    return Adapter(
        modules,
        code,
        config.get("base_model_name_or_path")?.takeUnless { it.isJsonNull }?.asText("base_model_name_or_path"),
        config.get("base_fingerprint")?.takeUnless { it.isJsonNull }?.asText("base_fingerprint"),
        config,
    )
}

/** Writes an adapter folder at a path that is free. */
fun saveAdapter(
    adapter: Adapter,
    folder: File,
) {
    val tensors = mutableMapOf<String, RawTensor>()
    for ((path, module) in adapter.modules) {
        tensors["$PREFIX$path.lordba_A.signs"] = module.aSigns
        tensors["$PREFIX$path.lordba_B.signs"] = module.bSigns
        for ((name, scales) in SCALE_NAMES.zip(module.scales)) {
            tensors["$PREFIX$path.lordba_scale_$name"] = scales.values
            scales.range?.let { tensors["$PREFIX$path.lordba_scale_$name.range"] = it }
        }
    }
    val metadata =
        mapOf("format" to "lordba", "format_version" to "$FORMAT_VERSION", "shapes" to shapesText(adapter.modules))
    newFolder(folder) {
        File(it, WEIGHTS_NAME).writeBytes(safetensorsBytes(tensors, metadata))
        File(it, CONFIG_NAME).writeText(configOf(adapter).toText(2) + "\n")
    }
}

private fun configOf(adapter: Adapter): JsonObject {
    val config = adapter.config.deepCopy()
    config.addProperty("peft_type", "LORDBA")
    config.addProperty("format_version", FORMAT_VERSION)
    config.addProperty("scale_code", adapter.scaleCode.id)
    config.addProperty("r", adapter.r)
    val targets = adapter.modules.keys.map { it.substringAfterLast('.') }
    config.add("target_modules", JsonArray().apply { targets.toSortedSet().forEach { add(it) } })
    config.addProperty("base_model_name_or_path", adapter.baseName)
    config.addProperty("base_fingerprint", adapter.baseFingerprint)
    return config
}

private fun shapesText(modules: Map<String, SignModule>): String =
    modules.toSortedMap().entries.joinToString(", ", "{", "}") { (path, module) ->
        "${JsonPrimitive(PREFIX + path)}: {\"d_in\": ${module.dIn}, \"d_out\": ${module.dOut}, \"r\": ${module.r}}"
    }

private fun missing(file: File) =
    LordbaError("$file: not found; an adapter folder holds $CONFIG_NAME and $WEIGHTS_NAME")

private fun readConfig(file: File): JsonObject {
    if (!file.isFile) throw missing(file)
    val config =
        try {
            parseJsonObject(file)
        } catch (error: JsonShapeError) {
            throw LordbaError("$file: is not readable JSON (${error.message}); copy the adapter anew", error)
        }
    val type = config.get("peft_type")
    if (type != JsonPrimitive("LORDBA")) {
        val hint =
            if (type ==
                JsonPrimitive("LORA")
            ) {
                "; convert it first: python -m lordba.convert PEFT_DIR OUT"
            } else {
                ""
            }
        throw LordbaError("$file: expected peft_type LORDBA, found $type$hint")
    }
    if (!config.has("format_version") && config.has("lora_alpha")) {
        throw LordbaError(
            "$file: belongs to latents that are in training; lordba.pack(model, DIR) writes them as signs and scales",
        )
    }
    if (config.get("format_version")?.toString() != "$FORMAT_VERSION") {
        throw LordbaError(
            "$file: format_version ${config.get("format_version")} is not known here (this app reads " +
                "$FORMAT_VERSION); install a newer app or convert the adapter again",
        )
    }
    val code = config.get("scale_code")
    if (ScaleCode.values().none { JsonPrimitive(it.id) == code }) {
        throw LordbaError("$file: scale_code must be one of ${ScaleCode.values().map { it.id }}, found $code")
    }
    return config
}

private class Shape(
    val dIn: Int,
    val dOut: Int,
    val r: Int,
)

private fun readShapes(
    metadata: Map<String, String>,
    file: File,
): Map<String, Shape> {
    if (metadata["format"] != "lordba" || metadata["format_version"] != "$FORMAT_VERSION") {
        throw LordbaError(
            "$file: safetensors metadata must say format=lordba, format_version=$FORMAT_VERSION; found " +
                "${metadata.filterKeys { it != "shapes" }}",
        )
    }
    val shapes =
        try {
            val json = parseJson(metadata["shapes"] ?: throw JsonShapeError("'shapes'")) as? JsonObject
            json?.entrySet().orEmpty().associate { (key, value) -> key to shapeOf(key, value as? JsonObject) }
        } catch (error: JsonShapeError) {
            throw LordbaError(
                "$file: the shapes metadata is not usable (${error.message}); write the adapter anew",
                error,
            )
        }
    if (shapes.isEmpty()) throw LordbaError("$file: holds no modules; there is nothing to adapt")
    return shapes
}

private fun shapeOf(
    key: String,
    json: JsonObject?,
): Shape {
    val sides = json?.let { listOf(it.long("d_in"), it.long("d_out"), it.long("r")) }
    if (sides == null || sides.any { it !in 1..(1 shl 24) } || !key.startsWith(PREFIX)) {
        throw JsonShapeError("entry '$key': $json")
    }
    return Shape(sides[0].toInt(), sides[1].toInt(), sides[2].toInt())
}

/** Takes one module's tensors out of [left], checked against its shape. */
private class ModuleReader(
    private val file: File,
    private val key: String,
    private val code: ScaleCode,
    private val left: MutableMap<String, RawTensor>,
) {
    fun read(shape: Shape) =
        SignModule(
            signs("lordba_A.signs", shape.r, shape.dIn),
            signs("lordba_B.signs", shape.dOut, shape.r),
            scales("in", shape.dIn),
            scales("mid", shape.r),
            scales("out", shape.dOut),
        )

    private fun take(name: String): RawTensor =
        left.remove("$key.$name")
            ?: throw LordbaError("$file: tensor $key.$name is missing; the file is incomplete, copy it anew")

    private fun signs(
        name: String,
        rows: Int,
        columns: Int,
    ): RawTensor {
        val packed = take(name)
        val expected = listOf(rows, packedWidth(columns))
        if (packed.dtype != DType.U8 || packed.shape != expected) {
            throw LordbaError("$file: $key.$name must be U8 $expected, found ${packed.dtype} ${packed.shape}")
        }
        val width = expected[1]
        val padding = if (columns % 8 == 0) 0 else 0xff shl columns % 8 and 0xff
        if ((0 until rows).any { packed.data[it * width + width - 1].toInt() and padding != 0 }) {
            throw LordbaError("$file: $key.$name has padding bits that are not zero; the file is damaged")
        }
        return packed
    }

    private fun scales(
        name: String,
        n: Int,
    ): EncodedScales {
        val values = take("lordba_scale_$name")
        val range = if (code.isCoded) take("lordba_scale_$name.range") else null
        return EncodedScales(code, n, values, range).also { it.check("$file: $key.lordba_scale_$name") }
    }
}
