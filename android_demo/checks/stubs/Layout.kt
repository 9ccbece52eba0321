package androidx.compose.foundation.layout

import androidx.compose.runtime.Composable
import androidx.compose.ui.Alignment
import androidx.compose.ui.Modifier
import androidx.compose.ui.unit.Dp

object Arrangement {
    interface Horizontal

    interface Vertical

    interface HorizontalOrVertical : Horizontal, Vertical

    val Top: Vertical = TODO()
    val Start: Horizontal = TODO()

    fun spacedBy(space: Dp): HorizontalOrVertical = TODO()
}

interface PaddingValues

fun PaddingValues(all: Dp): PaddingValues = TODO()

interface ColumnScope {
    fun Modifier.weight(weight: Float, fill: Boolean = true): Modifier
}

interface RowScope

@Composable
inline fun Column(
    modifier: Modifier = Modifier,
    verticalArrangement: Arrangement.Vertical = Arrangement.Top,
    horizontalAlignment: Alignment.Horizontal = Alignment.Start,
    content: @Composable ColumnScope.() -> Unit,
): Unit = TODO()

@Composable
inline fun Row(
    modifier: Modifier = Modifier,
    horizontalArrangement: Arrangement.Horizontal = Arrangement.Start,
    verticalAlignment: Alignment.Vertical = Alignment.Top,
    content: @Composable RowScope.() -> Unit,
): Unit = TODO()

fun Modifier.padding(all: Dp): Modifier = TODO()

fun Modifier.padding(start: Dp = Dp(0f), top: Dp = Dp(0f), end: Dp = Dp(0f), bottom: Dp = Dp(0f)): Modifier = TODO()

fun Modifier.padding(paddingValues: PaddingValues): Modifier = TODO()

fun Modifier.fillMaxSize(fraction: Float = 1f): Modifier = TODO()

fun Modifier.fillMaxWidth(fraction: Float = 1f): Modifier = TODO()

fun Modifier.height(height: Dp): Modifier = TODO()

fun Modifier.imePadding(): Modifier = TODO()
