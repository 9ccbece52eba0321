package ai.lordba.demo.core

import com.google.gson.JsonArray
import com.google.gson.JsonElement
import com.google.gson.JsonNull
import com.google.gson.JsonObject
import com.google.gson.JsonPrimitive
import java.math.BigDecimal
import java.math.RoundingMode

/** Where it was measured; memory in bytes. */
data class Device(
    val device: String,
    val arch: String,
    val os: String,
    val totalMem: Long,
    val availMem: Long,
)

/**
 * The samples of one thing that was measured, in milliseconds, warm-up left out.
 *
 * [adapter] is "none", "dense_lora" or "lordba"; [tokens] those of one run; [bits] those of one adapter weight.
 */
data class Series(
    val target: String,
    val model: String,
    val baseQuant: String,
    val adapter: String,
    val phase: String,
    val tokens: Int,
    val threads: Int,
    val samples: List<Double>,
    val adapterName: String? = null,
    val rank: Int? = null,
    val bits: Double? = null,
    val scaleCode: String? = null,
) {
    /** What two series share that may be compared. */
    val conditions: List<Any> get() = listOf(target, model, baseQuant, phase, tokens, threads)
}

/** The text of the profile file, byte for byte as lordba/profiling/record.py writes it. */
fun profileJson(
    series: List<Series>,
    device: Device,
    machine: JsonObject,
    conditions: JsonObject,
): String {
    val bases = series.filter { it.adapter == "none" }.associateBy { it.conditions }
    val record = JsonObject()
    record.addProperty("format_version", FORMAT_VERSION)
    record.add("machine", machine)
    record.add("conditions", conditions)
    record.add("rows", JsonArray().apply { series.forEach { add(row(it, bases[it.conditions], device)) } })
    return rounded(record).toText(1) + "\n"
}

private fun row(
    series: Series,
    base: Series?,
    device: Device,
): JsonObject {
    val over = base?.takeIf { it !== series }?.let { overhead(series.samples, it.samples) }
    val p50 = percentile(series.samples, 50.0)
    return jsonObject(
        "benchmarkModel" to
            jsonObject("name" to series.model, "backend" to series.target, "quantization" to series.baseQuant),
        "deviceInfo" to
            jsonObject(
                "device" to device.device,
                "arch" to device.arch,
                "os" to device.os,
                "totalMem" to device.totalMem,
                "availMem" to device.availMem,
            ),
        "metric" to "${series.phase}_ms",
        "actualValue" to p50,
        "targetValue" to 0.0,
        "target" to series.target,
        "model" to series.model,
        "adapter" to series.adapter,
        "adapter_name" to series.adapterName,
        "phase" to series.phase,
        "T" to series.tokens,
        "threads" to series.threads,
        "samples" to series.samples.size,
        "ms_p50" to p50,
        "ms_p90" to percentile(series.samples, 90.0),
        "ms_p99" to percentile(series.samples, 99.0),
        "overhead_pct" to over?.percent,
        "noise_pct" to over?.noisePercent,
        "rank" to series.rank,
        "bits" to series.bits,
        "scale_code" to series.scaleCode,
    )
}

/** A JSON object of strings, numbers, booleans, nulls and JSON. */
fun jsonObject(vararg entries: Pair<String, Any?>): JsonObject {
    val json = JsonObject()
    for ((key, value) in entries) {
        json.add(
            key,
            when (value) {
                null -> JsonNull.INSTANCE
                is JsonElement -> value
                is Number -> JsonPrimitive(value)
                is Boolean -> JsonPrimitive(value)
                else -> JsonPrimitive(value as String)
            },
        )
    }
    return json
}

/** The same with keys in order, and every float with at most three decimals, as all languages write it alike. */
private fun rounded(json: JsonElement): JsonElement =
    when (json) {
        is JsonObject -> {
            val sorted = JsonObject()
            json.entrySet().sortedBy { it.key }.forEach { (key, value) -> sorted.add(key, rounded(value)) }
            sorted
        }

        is JsonArray -> {
            JsonArray().apply { json.forEach { add(rounded(it)) } }
        }

        is JsonPrimitive -> {
            if (json.isNumber && isFloat(json.asNumber)) JsonPrimitive(decimals(json.asDouble)) else json
        }

        else -> {
            json
        }
    }

private fun isFloat(number: Number): Boolean = number.toString().any { it in ".eEN" }

/** As Python writes `round(value, 3)`, for magnitudes below 1e12. */
private fun decimals(value: Double): Number {
    require(!value.isNaN() && !value.isInfinite()) { "JSON has no $value" }
    val digits = BigDecimal(value).setScale(3, RoundingMode.HALF_EVEN)
    if (digits.signum() == 0) return if (value < 0) -0.0 else 0.0
    return digits.stripTrailingZeros().let { if (it.scale() < 1) it.setScale(1) else it }
}
