package ai.lordba.demo.runtime

/**
 * The native methods of liblordba_jni.so (android_demo/native/src/main/cpp/jni_program.cpp).
 *
 * They take objects by their handles, from one thread at a time, and throw LordbaError. [closeProgram] and its like take
 * 0 too.
 */
internal object ExecuTorch {
    init {
        System.loadLibrary("lordba_jni")
    }

    external fun openProgram(
        path: String,
        operators: Array<String>,
        threads: Int,
    ): Long

    external fun closeProgram(program: Long)

    external fun longestInput(program: Long): Int

    external fun takesBlob(program: Long): Boolean

    external fun useData(
        program: Long,
        files: Array<String>,
    )

    external fun useBlob(
        program: Long,
        blob: Long,
    )

    external fun run(
        program: Long,
        tokens: IntArray,
        start: Int,
    ): FloatArray

    external fun openBlob(path: String): Long

    external fun closeBlob(blob: Long)

    external fun openPeakMemory(): Long

    external fun stopPeakMemory(watch: Long): Long

    external fun closePeakMemory(watch: Long)
}
