package androidx.compose.ui.text

import androidx.compose.runtime.Composable
import androidx.compose.ui.geometry.Offset
import androidx.compose.ui.graphics.Color
import androidx.compose.ui.graphics.drawscope.DrawScope
import androidx.compose.ui.unit.IntSize

class TextStyle {
    fun copy(color: Color = Color.Unspecified): TextStyle = TODO()
}

class TextLayoutResult {
    val size: IntSize get() = TODO()
}

class TextMeasurer {
    fun measure(text: String, style: TextStyle = TextStyle()): TextLayoutResult = TODO()
}

@Composable
fun rememberTextMeasurer(cacheSize: Int = 8): TextMeasurer = TODO()

fun DrawScope.drawText(
    textLayoutResult: TextLayoutResult,
    color: Color = Color.Unspecified,
    topLeft: Offset = Offset.Zero,
): Unit = TODO()
