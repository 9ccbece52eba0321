package ai.lordba.demo.app

import ai.lordba.demo.core.FineTune
import ai.lordba.demo.core.FineTuneFiles
import ai.lordba.demo.core.FineTuneRequest
import ai.lordba.demo.core.FineTuneState
import ai.lordba.demo.core.LordbaError
import ai.lordba.demo.core.newFile
import androidx.lifecycle.SavedStateHandle
import androidx.lifecycle.ViewModel
import androidx.lifecycle.viewModelScope
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.delay
import kotlinx.coroutines.flow.MutableStateFlow
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.asStateFlow
import kotlinx.coroutines.flow.collectLatest
import kotlinx.coroutines.flow.drop
import kotlinx.coroutines.flow.map
import kotlinx.coroutines.flow.update
import kotlinx.coroutines.launch
import kotlinx.coroutines.withContext

/** What the user typed; [start] null starts from nothing. */
data class FineTuneForm(
    val text: String = "",
    val name: String = "mine",
    val start: String? = null,
    val steps: Int = 40,
)

/** [whyNot] says why nothing can be trained now, or is null; [pending] is a run that did not end. */
data class FineTuneScreenState(
    val form: FineTuneForm = FineTuneForm(),
    val run: FineTuneState = FineTuneState.Idle,
    val adapters: List<String> = emptyList(),
    val isReady: Boolean = false,
    val whyNot: String? = null,
    val pending: FineTuneRequest? = null,
)

class FineTuneViewModel(
    private val services: Services,
    private val saved: SavedStateHandle,
) : ViewModel() {
    private val states = MutableStateFlow(FineTuneScreenState(restored()))
    val state: StateFlow<FineTuneScreenState> = states.asStateFlow()
    private var running: FineTune? = null

    init {
        viewModelScope.launch { restoreDraft() }
        viewModelScope.launch { services.engine.state.collect(::follow) }
    }

    fun edit(form: FineTuneForm) {
        saved[NAME] = form.name
        saved[START] = form.start
        saved[STEPS] = form.steps
        states.update { it.copy(form = form) }
    }

    fun train() {
        val form = states.value.form
        launch { it.run(FineTuneRequest(form.text, form.name, form.start, form.steps)) }
    }

    fun resume() = launch { it.resume() }

    fun pause() = running?.pause()

    fun cancel() = running?.cancel()

    private fun launch(work: (FineTune) -> FineTuneState) {
        val opened = (services.engine.state.value as? EngineState.Ready)?.opened ?: return
        if (states.value.run.isBusy) return
        val tune =
            FineTune(opened.bank, opened.tokenizer, services.trainers, services.trainingFiles) { run ->
                states.update { it.copy(run = run) }
            }
        running = tune
        states.update { it.copy(run = FineTuneState.Preparing) }
        viewModelScope.launch(Dispatchers.Default) {
            work(tune)
            follow(services.engine.state.value)
        }
    }

    private suspend fun follow(engine: EngineState) =
        withContext(Dispatchers.IO) {
            val bank = (engine as? EngineState.Ready)?.opened?.bank
            val whyNot = bank?.let { services.trainers.whyNot(it.bundle) }
            val pending = bank?.let { FineTuneFiles(services.trainingFiles, it.bundle.manifest.fingerprint).pending() }
            states.update { before ->
                before.copy(
                    adapters = bank?.names.orEmpty(),
                    isReady = bank != null,
                    whyNot = whyNot,
                    pending = pending,
                    form = before.form.copy(start = before.form.start?.takeIf { bank == null || it in bank.names }),
                )
            }
        }

    /** Too long for what a screen may save, the text goes to a file of its own, half a second after the last key. */
    private suspend fun restoreDraft() {
        val text =
            withContext(Dispatchers.IO) {
                services.draft
                    .takeIf { it.isFile }
                    ?.readText()
                    .orEmpty()
            }
        states.update { if (it.form.text.isEmpty()) it.copy(form = it.form.copy(text = text)) else it }
        states.map { it.form.text }.drop(1).collectLatest { changed ->
            delay(500)
            withContext(Dispatchers.IO) { saveDraft(changed) }
        }
    }

    private fun restored() =
        FineTuneForm(name = saved[NAME] ?: "mine", start = saved[START], steps = saved[STEPS] ?: 40)

    private fun saveDraft(text: String) =
        try {
            if (services.draft.isFile && services.draft.readText() == text) {
                Unit
            } else {
                newFile(services.draft) { it.write(text.toByteArray()) }
            }
        } catch (error: LordbaError) {
            states.update { it.copy(run = FineTuneState.Failed(error.message.orEmpty(), emptyList())) }
        }

    /** The step that runs ends, a checkpoint is written, and the run can go on later. */
    override fun onCleared() {
        running?.pause()
    }

    private companion object {
        const val NAME = "name"
        const val START = "start"
        const val STEPS = "steps"
    }
}
