@file:Suppress("unused")

package androidx.compose.runtime

internal object ComposeVersion {
    const val version: Int = 14000
}

/** What the Compose compiler asks of a runtime. */
interface Composer {
    fun startRestartGroup(key: Int): Composer

    fun endRestartGroup(): ScopeUpdateScope?

    fun startReplaceableGroup(key: Int)

    fun endReplaceableGroup()

    fun startReplaceGroup(key: Int)

    fun endReplaceGroup()

    fun startMovableGroup(key: Int, dataKey: Any?)

    fun endMovableGroup()

    fun startDefaults()

    fun endDefaults()

    val defaultsInvalid: Boolean
    val skipping: Boolean

    fun skipToGroupEnd()

    fun shouldExecute(parametersChanged: Boolean, flags: Int): Boolean

    fun rememberedValue(): Any?

    fun updateRememberedValue(value: Any?)

    fun changed(value: Any?): Boolean

    fun changedInstance(value: Any?): Boolean

    fun changed(value: Boolean): Boolean

    fun changed(value: Char): Boolean

    fun changed(value: Byte): Boolean

    fun changed(value: Short): Boolean

    fun changed(value: Int): Boolean

    fun changed(value: Float): Boolean

    fun changed(value: Long): Boolean

    fun changed(value: Double): Boolean

    fun sourceInformation(sourceInformation: String)

    fun sourceInformationMarkerStart(key: Int, sourceInformation: String)

    fun sourceInformationMarkerEnd()

    fun joinKey(left: Any?, right: Any?): Any

    companion object {
        val Empty: Any = Any()
    }
}

interface ScopeUpdateScope {
    fun updateScope(block: (Composer, Int) -> Unit)
}

interface RecomposeScope

internal fun recomposeScope(): RecomposeScope = TODO()

fun updateChangedFlags(flags: Int): Int = TODO()

fun isTraceInProgress(): Boolean = TODO()

fun traceEventStart(key: Int, dirty1: Int, dirty2: Int, info: String): Unit = TODO()

fun traceEventEnd(): Unit = TODO()

fun sourceInformation(composer: Composer, sourceInformation: String): Unit = TODO()

fun sourceInformationMarkerStart(composer: Composer, key: Int, sourceInformation: String): Unit = TODO()

fun sourceInformationMarkerEnd(composer: Composer): Unit = TODO()

inline fun <T> Composer.cache(invalid: Boolean, block: @DisallowComposableCalls () -> T): T = TODO()

@Target(AnnotationTarget.TYPE, AnnotationTarget.TYPE_PARAMETER)
annotation class DisallowComposableCalls

@Target(AnnotationTarget.FUNCTION, AnnotationTarget.PROPERTY_GETTER)
annotation class ReadOnlyComposable

@Target(AnnotationTarget.FUNCTION, AnnotationTarget.PROPERTY_GETTER)
annotation class NonRestartableComposable

@Target(AnnotationTarget.FUNCTION, AnnotationTarget.PROPERTY_GETTER, AnnotationTarget.PROPERTY)
annotation class ExplicitGroupsComposable

@Target(AnnotationTarget.CLASS)
annotation class Immutable

@Target(AnnotationTarget.CLASS)
annotation class StableMarker
