package ai.lordba.demo.app

import ai.lordba.demo.core.Series
import ai.lordba.demo.core.curve
import ai.lordba.demo.core.percentile
import ai.lordba.demo.core.ticks
import androidx.compose.foundation.Canvas
import androidx.compose.material3.MaterialTheme
import androidx.compose.runtime.Composable
import androidx.compose.ui.Modifier
import androidx.compose.ui.geometry.Offset
import androidx.compose.ui.geometry.Size
import androidx.compose.ui.graphics.Path
import androidx.compose.ui.graphics.drawscope.DrawScope
import androidx.compose.ui.graphics.drawscope.Stroke
import androidx.compose.ui.text.TextMeasurer
import androidx.compose.ui.text.TextStyle
import androidx.compose.ui.text.drawText
import androidx.compose.ui.text.rememberTextMeasurer
import androidx.compose.ui.unit.dp

/** The loss of every step so far, with the axis it is to be read by. */
@Composable
fun LossCurve(
    losses: List<Float>,
    modifier: Modifier = Modifier,
) {
    val line = MaterialTheme.colorScheme.primary
    val grid = MaterialTheme.colorScheme.outlineVariant
    val labels = MaterialTheme.typography.labelSmall.copy(color = MaterialTheme.colorScheme.onSurface)
    val measurer = rememberTextMeasurer()
    Canvas(modifier) {
        val axis = ticks(losses.min().toDouble(), losses.max().toDouble())
        val left = 36.dp.toPx()
        for (tick in axis) {
            val y = size.height * (1 - ((tick - axis.first()) / (axis.last() - axis.first())).toFloat())
            drawLine(grid, Offset(left, y), Offset(size.width, y))
            label(measurer, numberText(tick, 2), labels, Offset(0f, y))
        }
        val path = Path()
        curve(losses, axis).forEachIndexed { i, (x, y) ->
            val point = Offset(left + x * (size.width - left), size.height * (1 - y))
            if (i == 0) path.moveTo(point.x, point.y) else path.lineTo(point.x, point.y)
        }
        drawPath(path, line, style = Stroke(width = 2.dp.toPx()))
    }
}

/** A bar from zero to each median, a thin line on to the 99th percentile. */
@Composable
fun LatencyBars(
    series: List<Series>,
    modifier: Modifier = Modifier,
) {
    val base = MaterialTheme.colorScheme.secondary
    val adapted = MaterialTheme.colorScheme.primary
    val reach = MaterialTheme.colorScheme.outline
    Canvas(modifier) {
        val longest = series.maxOf { percentile(it.samples, 99.0) }
        val height = size.height / series.size
        series.forEachIndexed { i, one ->
            val color = if (one.adapter == "none") base else adapted
            val median = (percentile(one.samples, 50.0) / longest).toFloat() * size.width
            val late = (percentile(one.samples, 99.0) / longest).toFloat() * size.width
            val middle = height * (i + 0.5f)
            drawRect(color, Offset(0f, height * (i + 0.15f)), Size(median, height * 0.7f))
            drawLine(reach, Offset(median, middle), Offset(late, middle), strokeWidth = 2.dp.toPx())
        }
    }
}

/** Text whose middle lies at the height of [at], kept inside the canvas. */
private fun DrawScope.label(
    measurer: TextMeasurer,
    text: String,
    style: TextStyle,
    at: Offset,
) {
    val measured = measurer.measure(text, style)
    val top = (at.y - measured.size.height / 2f).coerceIn(0f, size.height - measured.size.height)
    drawText(measured, topLeft = Offset(at.x, top))
}
