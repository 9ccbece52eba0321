package androidx.compose.ui.geometry

@JvmInline
value class Offset(val packedValue: Long) {
    val x: Float get() = TODO()
    val y: Float get() = TODO()

    companion object {
        val Zero: Offset = TODO()
    }
}

fun Offset(x: Float, y: Float): Offset = TODO()

@JvmInline
value class Size(val packedValue: Long) {
    val width: Float get() = TODO()
    val height: Float get() = TODO()
}

fun Size(width: Float, height: Float): Size = TODO()
