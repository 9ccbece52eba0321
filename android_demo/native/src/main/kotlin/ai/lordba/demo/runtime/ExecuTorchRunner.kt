package ai.lordba.demo.runtime

import ai.lordba.demo.core.Bundle
import ai.lordba.demo.core.LoadedAdapter
import ai.lordba.demo.core.LordbaError
import ai.lordba.demo.core.Runner
import java.io.File

/**
 * Runs a bundle for ExecuTorch; what `ExecuTorchRunner` of lordba/runtime/executorch_runner.py is.
 *
 * Adapters are inputs, or data files with which the program is loaded anew. [threads] 0 leaves their number to ExecuTorch,
 * which has one pool of threads for all programs of the process.
 */
class ExecuTorchRunner(
    bundle: Bundle,
    threads: Int = 0,
) : Runner {
    private var program = ExecuTorch.openProgram(bundle.program.path, bundle.manifest.requires.toTypedArray(), threads)
    private val takesBlob = ExecuTorch.takesBlob(program)

    override val longest = ExecuTorch.longestInput(program)

    init {
        val mode = if (takesBlob) "input" else "ptd"
        if (bundle.manifest.adapterMode != mode) {
            close()
            throw LordbaError(
                "${bundle.program}: takes adapters as $mode, the manifest says ${bundle.manifest.adapterMode}; " +
                    "export the bundle again",
            )
        }
    }

    override fun load(file: File?): LoadedAdapter {
        if (!takesBlob) return DataFile(file)
        if (file == null) throw LordbaError("the program needs a file for the base alone too; export the bundle again")
        return BlobInput(ExecuTorch.openBlob(file.path))
    }

    override fun use(adapter: LoadedAdapter) {
        when (adapter) {
            is BlobInput -> ExecuTorch.useBlob(open(), adapter.blob)
            is DataFile -> ExecuTorch.useData(open(), listOfNotNull(adapter.file?.path).toTypedArray())
            else -> throw LordbaError("an adapter that another runner loaded cannot be used here; load it here")
        }
    }

    override fun run(
        tokens: IntArray,
        start: Int,
    ): FloatArray = ExecuTorch.run(open(), tokens, start)

    override fun close() {
        ExecuTorch.closeProgram(program)
        program = 0
    }

    private fun open(): Long = if (program != 0L) program else throw LordbaError("the program is closed; open it again")
}

/** An adapter that is a file with which the program is loaded; it holds no memory. */
private class DataFile(
    val file: File?,
) : LoadedAdapter {
    override fun close() = Unit
}

private class BlobInput(
    blob: Long,
) : LoadedAdapter {
    var blob = blob
        private set

    override fun close() {
        ExecuTorch.closeBlob(blob)
        blob = 0
    }
}
