package androidx.compose.ui

interface Modifier {
    companion object : Modifier
}

interface Alignment {
    interface Horizontal

    interface Vertical

    companion object {
        val Top: Vertical = TODO()
        val Start: Horizontal = TODO()
    }
}
