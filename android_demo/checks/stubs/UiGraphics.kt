package androidx.compose.ui.graphics

@JvmInline
value class Color(val value: ULong) {
    companion object {
        val Unspecified: Color = TODO()
    }
}

abstract class Brush

abstract class ColorFilter

interface PathEffect

interface Path {
    fun moveTo(x: Float, y: Float)

    fun lineTo(x: Float, y: Float)
}

fun Path(): Path = TODO()
