package ai.lordba.demo.app

import ai.lordba.demo.core.AdapterBank
import ai.lordba.demo.core.LordbaError
import ai.lordba.demo.core.RunnerFactory
import ai.lordba.demo.core.Tokenizer
import ai.lordba.demo.core.readBundle
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.flow.MutableStateFlow
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.asStateFlow
import kotlinx.coroutines.launch
import kotlinx.coroutines.sync.Mutex
import kotlinx.coroutines.sync.withLock
import java.io.File

/** A bundle that was verified, with its program loaded. */
class OpenBundle(
    val id: String,
    val bank: AdapterBank,
    val tokenizer: Tokenizer,
)

sealed interface EngineState {
    data object Closed : EngineState

    /** The files are verified: [checked] of [total] bytes. */
    data class Checking(
        val id: String,
        val checked: Long,
        val total: Long,
    ) : EngineState

    data class Loading(
        val id: String,
    ) : EngineState

    data class Ready(
        val opened: OpenBundle,
    ) : EngineState

    data class Failed(
        val id: String,
        val message: String,
    ) : EngineState
}

/** The one bundle that is open. It outlives the screens: opening takes seconds. */
class Engine(
    private val runners: RunnerFactory,
    private val scope: CoroutineScope,
) {
    private val states = MutableStateFlow<EngineState>(EngineState.Closed)
    private val changing = Mutex()

    /** Threads that the runtime computes with: the fast cores of most phones. */
    val threads = minOf(4, Runtime.getRuntime().availableProcessors())
    val state: StateFlow<EngineState> = states.asStateFlow()

    /** Opens the bundle in the folder [id] unless it is open; closes the other one before, once its answer is done. */
    fun open(id: String) {
        scope.launch {
            changing.withLock {
                if (opened()?.id == id) return@withLock
                close()
                states.value =
                    try {
                        EngineState.Ready(load(id))
                    } catch (error: LordbaError) {
                        EngineState.Failed(id, error.message.orEmpty())
                    }
            }
        }
    }

    /** Closes the bundle in this folder if it is the open one, then does something with the folder, such as delete it. */
    suspend fun release(
        id: String,
        then: () -> Unit,
    ) = changing.withLock {
        if (opened()?.id == id) close()
        then()
    }

    private fun opened(): OpenBundle? = (states.value as? EngineState.Ready)?.opened

    private fun close() {
        val before = opened()
        states.value = EngineState.Closed
        before?.bank?.close()
    }

    private fun load(id: String): OpenBundle {
        val bundle = readBundle(File(id)) { checked, total -> states.value = EngineState.Checking(id, checked, total) }
        states.value = EngineState.Loading(id)
        val file = bundle.manifest.tokenizer ?: throw LordbaError("$id: holds no tokenizer; export the bundle again")
        val tokenizer = Tokenizer.read(File(bundle.folder, file))
        return OpenBundle(id, AdapterBank(bundle, runners.open(bundle, threads)), tokenizer)
    }
}
