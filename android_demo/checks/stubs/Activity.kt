package androidx.activity

import android.app.Activity

open class ComponentActivity : Activity()

fun ComponentActivity.enableEdgeToEdge(): Unit = TODO()
