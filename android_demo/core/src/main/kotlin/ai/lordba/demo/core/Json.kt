package ai.lordba.demo.core

import com.google.gson.Gson
import com.google.gson.JsonArray
import com.google.gson.JsonElement
import com.google.gson.JsonObject
import com.google.gson.JsonParseException
import com.google.gson.stream.JsonReader
import com.google.gson.stream.JsonToken
import com.google.gson.stream.JsonWriter
import java.io.File
import java.io.IOException
import java.io.StringReader
import java.io.StringWriter

/** A key that is absent or holds something else than expected; readers of files say of which file. */
class JsonShapeError(
    message: String,
) : Exception(message)

/** Parses strict JSON; throws [JsonShapeError]. Numbers keep the digits that they were written with. */
fun parseJson(text: String): JsonElement =
    try {
        val reader = JsonReader(StringReader(text))
        val value = GSON.getAdapter(JsonElement::class.java).read(reader)
        if (reader.peek() != JsonToken.END_DOCUMENT) throw JsonShapeError("something follows the JSON value")
        value
    } catch (error: JsonParseException) {
        throw JsonShapeError(error.message ?: "no JSON")
    } catch (error: IOException) {
        throw JsonShapeError(error.message ?: "no JSON")
    }

/** Parses a file that holds one JSON object. */
fun parseJsonObject(file: File): JsonObject =
    try {
        parseJson(file.readText()) as? JsonObject ?: throw JsonShapeError("expected an object")
    } catch (error: IOException) {
        throw JsonShapeError(error.message ?: "cannot be read")
    }

/** Writes JSON as Python's `json.dumps(..., indent=n, ensure_ascii=False)` does, nulls included. */
fun JsonElement.toText(indent: Int): String {
    val text = StringWriter()
    val writer = JsonWriter(text)
    writer.setIndent(" ".repeat(indent))
    writer.serializeNulls = true
    GSON.getAdapter(JsonElement::class.java).write(writer, this)
    return text.toString()
}

fun JsonObject.need(key: String): JsonElement = get(key) ?: throw JsonShapeError("'$key'")

fun JsonObject.string(key: String): String = need(key).asText(key)

fun JsonObject.textOrNull(key: String): String? = need(key).takeUnless { it.isJsonNull }?.asText(key)

fun JsonObject.int(key: String): Int = need(key).asWhole(key).toInt()

fun JsonObject.long(key: String): Long = need(key).asWhole(key)

fun JsonObject.number(key: String): Double =
    need(key).takeIf { it.isJsonPrimitive && it.asJsonPrimitive.isNumber }?.asDouble
        ?: throw JsonShapeError("'$key' must be a number, found ${need(key)}")

fun JsonObject.boolean(key: String): Boolean =
    need(key).takeIf { it.isJsonPrimitive && it.asJsonPrimitive.isBoolean }?.asBoolean
        ?: throw JsonShapeError("'$key' must be true or false, found ${need(key)}")

fun JsonObject.list(key: String): JsonArray =
    need(key) as? JsonArray ?: throw JsonShapeError("'$key' must be a list, found ${need(key)}")

fun JsonObject.objects(key: String): List<JsonObject> =
    list(key).map { it as? JsonObject ?: throw JsonShapeError("'$key' must hold objects, found $it") }

fun JsonObject.nested(key: String): JsonObject =
    need(key) as? JsonObject ?: throw JsonShapeError("'$key' must be an object, found ${need(key)}")

fun JsonElement.asText(key: String): String =
    takeIf { it.isJsonPrimitive && it.asJsonPrimitive.isString }?.asString
        ?: throw JsonShapeError("'$key' must be a string, found $this")

fun JsonElement.asWhole(key: String): Long =
    takeIf { it.isJsonPrimitive && it.asJsonPrimitive.isNumber }?.asString?.toLongOrNull()
        ?: throw JsonShapeError("'$key' must be a whole number, found $this")

private val GSON = Gson()
