package ai.lordba.demo.runtime

import ai.lordba.demo.core.Bundle
import ai.lordba.demo.core.LordbaError
import ai.lordba.demo.core.Runner
import ai.lordba.demo.core.RunnerFactory

/** The runtimes of this app: ONNX Runtime with our operator, ExecuTorch with our operators built in. */
object NativeRunners : RunnerFactory {
    override fun open(
        bundle: Bundle,
        threads: Int,
    ): Runner =
        try {
            when (bundle.manifest.target) {
                "onnx" -> OrtRunner(bundle, threads)

                "executorch" -> ExecuTorchRunner(bundle, threads)

                else -> throw LordbaError(
                    "${bundle.folder}: is for ${bundle.manifest.target}, which does not run on Android; " +
                        "export it with --target executorch or onnx",
                )
            }
        } catch (error: LinkageError) {
            // of the library itself, or of the class that loads it
            throw LordbaError(
                "${bundle.folder}: this build of the app has no native library for ${bundle.manifest.target} " +
                    "(${error.message}); build it as android_demo/README.md says",
                error,
            )
        }
}
