package androidx.compose.ui.res

import androidx.annotation.DrawableRes
import androidx.annotation.StringRes
import androidx.compose.runtime.Composable
import androidx.compose.ui.graphics.painter.Painter

@Composable
fun painterResource(@DrawableRes id: Int): Painter = TODO()

@Composable
fun stringResource(@StringRes id: Int): String = TODO()

@Composable
fun stringResource(@StringRes id: Int, vararg formatArgs: Any): String = TODO()
