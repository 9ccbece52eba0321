package androidx.compose.ui.unit

@JvmInline
value class Dp(val value: Float)

val Int.dp: Dp get() = TODO()

interface Density {
    fun Dp.toPx(): Float
}

@JvmInline
value class IntSize(val packed: Long) {
    val width: Int get() = TODO()
    val height: Int get() = TODO()
}

enum class LayoutDirection { Ltr, Rtl }
