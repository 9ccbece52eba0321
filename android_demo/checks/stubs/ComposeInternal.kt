package androidx.compose.runtime.internal

import androidx.compose.runtime.Composable
import androidx.compose.runtime.Composer

interface ComposableLambda

class ComposableLambdaN

fun composableLambda(composer: Composer, key: Int, tracked: Boolean, block: Any): ComposableLambda = TODO()

fun composableLambdaInstance(key: Int, tracked: Boolean, block: Any): ComposableLambda = TODO()

@Composable
fun rememberComposableLambda(key: Int, tracked: Boolean, block: Any): ComposableLambda = TODO()

@Target(AnnotationTarget.CLASS)
annotation class StabilityInferred(val parameters: Int)

@Target(AnnotationTarget.CLASS)
annotation class LiveLiteralFileInfo(val file: String)

@Target(AnnotationTarget.FUNCTION)
annotation class FunctionKeyMeta(val key: Int, val startOffset: Int, val endOffset: Int)

@Retention(AnnotationRetention.BINARY)
@Target(AnnotationTarget.CLASS)
annotation class FunctionKeyMetaClass(val file: String)
