package ai.lordba.demo.runtime

/** The native methods of training in liblordba_jni.so (jni_trainer.cpp); see [ExecuTorch]. */
internal object TrainingProgram {
    init {
        System.loadLibrary("lordba_jni")
    }

    external fun open(
        path: String,
        seed: Long,
    ): Long

    external fun close(trainer: Long)

    external fun longest(trainer: Long): Int

    /** r, d_in and d_out of every module of the bundle, r = 0 where it is not adapted. */
    external fun modules(trainer: Long): IntArray

    external fun setFactors(
        trainer: Long,
        index: Int,
        a: FloatArray,
        b: FloatArray,
    )

    external fun step(
        trainer: Long,
        tokens: IntArray,
        rate: Float,
    ): Float

    /** Signs of A and B, log4 codes of s_in, s_mid and s_out, and the ranges of all three. */
    external fun pack(
        trainer: Long,
        index: Int,
    ): Array<ByteArray>

    external fun save(
        trainer: Long,
        file: String,
        note: String,
    )

    external fun load(
        trainer: Long,
        file: String,
    ): String
}
