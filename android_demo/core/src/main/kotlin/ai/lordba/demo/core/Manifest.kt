package ai.lordba.demo.core

import com.google.gson.JsonArray
import com.google.gson.JsonObject

const val FORMAT_VERSION = 1
const val MANIFEST_NAME = "manifest.json"

/** A file of the bundle, relative to its folder. */
data class BundleFile(
    val path: String,
    val bytes: Long,
    val sha256: String,
)

/** An adapter of the bundle: [bytes] are signs and scales as stored, [fileBytes] the runtime's file. */
data class BundleAdapter(
    val name: String,
    val file: String,
    val r: Int,
    val scaleCode: String,
    val modules: Int,
    val bytes: Long,
    val fp16LoraBytes: Long,
    val fileBytes: Long,
    val function: String? = null,
)

/** One measured figure with its limit; [adapter] is null for the base alone or for the whole program. */
data class ParityCheck(
    val check: String,
    val adapter: String?,
    val metric: String,
    val value: Double,
    val limit: Double,
    val passed: Boolean,
)

/** What manifest.json says (format version 1); [record] is the file itself, with keys that are not known here. */
data class Manifest(
    val target: String,
    val program: String,
    val base: Map<String, String>,
    val baseQuant: String,
    val toolchain: Map<String, String>,
    val requires: List<String>,
    val adapterMode: String,
    val maxSeqLen: Int,
    val eosIds: List<Int>,
    /** Paths of the adapted modules in the order of the program's blob; null is a layer that is never adapted. */
    val modules: List<String?>,
    val files: List<BundleFile>,
    val adapters: List<BundleAdapter>,
    val parity: List<ParityCheck>,
    val tokenizer: String?,
    /** The file that stands for "no adapter", where the program needs one. */
    val noAdapter: String?,
    val record: JsonObject,
) {
    val baseName: String get() = base.getValue("name")
    val fingerprint: String get() = base.getValue("fingerprint")
}

/** Takes the manifest out of its JSON; throws [JsonShapeError] for a key that is missing or of another type. */
fun manifestOf(record: JsonObject): Manifest =
    Manifest(
        target = record.string("target"),
        program = record.string("program"),
        base =
            strings(record, "base").also { base ->
                listOf("name", "fingerprint").forEach { base[it] ?: absent(it) }
            },
        baseQuant = record.string("base_quant"),
        toolchain = strings(record, "toolchain"),
        requires = record.list("requires").map { it.asText("requires") },
        adapterMode = record.string("adapter_mode"),
        maxSeqLen = record.int("max_seq_len"),
        eosIds = record.list("eos_ids").map { it.asWhole("eos_ids").toInt() },
        modules = record.list("modules").map { if (it.isJsonNull) null else it.asText("modules") },
        files = record.objects("files").map { BundleFile(it.string("path"), it.long("bytes"), it.string("sha256")) },
        adapters = record.objects("adapters").map(::adapterOf),
        parity = record.objects("parity").map(::parityOf),
        tokenizer = record.textOrNull("tokenizer"),
        noAdapter = record.textOrNull("no_adapter"),
        record = record,
    )

/** The same manifest with other adapters and files; what else the record says stays. */
fun Manifest.with(
    adapters: List<BundleAdapter>,
    files: List<BundleFile>,
): Manifest {
    val changed = record.deepCopy()
    changed.add("adapters", JsonArray().apply { adapters.forEach { add(jsonOf(it)) } })
    changed.add("files", JsonArray().apply { files.forEach { add(jsonOf(it)) } })
    return copy(adapters = adapters, files = files, record = changed)
}

private fun adapterOf(json: JsonObject) =
    BundleAdapter(
        name = json.string("name"),
        file = json.string("file"),
        r = json.int("r"),
        scaleCode = json.string("scale_code"),
        modules = json.int("modules"),
        bytes = json.long("bytes"),
        fp16LoraBytes = json.long("fp16_lora_bytes"),
        fileBytes = json.long("file_bytes"),
        function = if (json.has("function")) json.textOrNull("function") else null,
    )

private fun parityOf(json: JsonObject) =
    ParityCheck(
        json.string("check"),
        json.textOrNull("adapter"),
        json.string("metric"),
        json.number("value"),
        json.number("limit"),
        json.boolean("passed"),
    )

private fun jsonOf(adapter: BundleAdapter) =
    JsonObject().apply {
        addProperty("name", adapter.name)
        addProperty("file", adapter.file)
        addProperty("r", adapter.r)
        addProperty("scale_code", adapter.scaleCode)
        addProperty("modules", adapter.modules)
        addProperty("bytes", adapter.bytes)
        addProperty("fp16_lora_bytes", adapter.fp16LoraBytes)
        addProperty("file_bytes", adapter.fileBytes)
        addProperty("function", adapter.function)
    }

private fun jsonOf(file: BundleFile) =
    JsonObject().apply {
        addProperty("path", file.path)
        addProperty("bytes", file.bytes)
        addProperty("sha256", file.sha256)
    }

private fun strings(
    record: JsonObject,
    key: String,
): Map<String, String> = record.nested(key).entrySet().associate { (name, value) -> name to value.asText(name) }

private fun absent(key: String): Nothing = throw JsonShapeError("'$key'")
