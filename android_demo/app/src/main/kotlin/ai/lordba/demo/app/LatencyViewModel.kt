package ai.lordba.demo.app

import ai.lordba.demo.core.LatencyPlan
import ai.lordba.demo.core.LatencyRun
import ai.lordba.demo.core.LordbaError
import ai.lordba.demo.core.Series
import ai.lordba.demo.core.jsonObject
import ai.lordba.demo.core.newFile
import ai.lordba.demo.core.profileJson
import androidx.lifecycle.SavedStateHandle
import androidx.lifecycle.ViewModel
import androidx.lifecycle.viewModelScope
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.flow.MutableStateFlow
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.asStateFlow
import kotlinx.coroutines.flow.update
import kotlinx.coroutines.launch
import java.io.File

/** [series] are the last measurements and [file] their JSON; [round] of [rounds] while it measures. */
data class LatencyScreenState(
    val adapters: List<String> = emptyList(),
    val picked: Set<String> = emptySet(),
    val isReady: Boolean = false,
    val isMeasuring: Boolean = false,
    val round: Int = 0,
    val rounds: Int = 0,
    val series: List<Series> = emptyList(),
    val file: File? = null,
    val error: String? = null,
)

class LatencyViewModel(
    private val services: Services,
    private val saved: SavedStateHandle,
) : ViewModel() {
    private val states =
        MutableStateFlow(LatencyScreenState(picked = saved.get<Array<String>>(PICKED).orEmpty().toSet()))
    val state: StateFlow<LatencyScreenState> = states.asStateFlow()

    @Volatile
    private var stopped = false

    init {
        viewModelScope.launch { services.engine.state.collect(::follow) }
    }

    fun refresh() = follow(services.engine.state.value)

    fun toggle(adapter: String) {
        val picked = states.value.picked.let { if (adapter in it) it - adapter else it + adapter }
        saved[PICKED] = picked.toTypedArray()
        states.update { it.copy(picked = picked) }
    }

    fun stop() {
        stopped = true
    }

    fun measure() {
        val opened = (services.engine.state.value as? EngineState.Ready)?.opened ?: return
        if (states.value.isMeasuring) return
        stopped = false
        states.update { it.copy(isMeasuring = true, round = 0, error = null) }
        val wanted = states.value.picked.filter { it in opened.bank.names }
        viewModelScope.launch(Dispatchers.Default) {
            try {
                val plan = planFor(opened, wanted)
                val series =
                    LatencyRun(opened.bank, plan).run { round, of ->
                        states.update { it.copy(round = round, rounds = of) }
                        !stopped
                    }
                val file = File(services.profiles, "profile-${opened.bank.bundle.folder.name}.json")
                export(series, plan, file)
                states.update { it.copy(series = series, file = file) }
            } catch (error: LordbaError) {
                states.update { it.copy(error = error.message) }
            } finally {
                states.update { it.copy(isMeasuring = false) }
            }
        }
    }

    private fun planFor(
        opened: OpenBundle,
        adapters: List<String>,
    ): LatencyPlan {
        val longest = opened.bank.bundle.manifest.maxSeqLen
        return LatencyPlan(
            adapters,
            prefillTokens = minOf(128, longest / 2),
            decodeTokens = minOf(32, longest / 4),
            threads = services.engine.threads,
        )
    }

    private fun export(
        series: List<Series>,
        plan: LatencyPlan,
        file: File,
    ) {
        val conditions = jsonObject("warm_up" to plan.warmUp, "rounds" to plan.rounds, "interleaved" to true)
        val text = profileJson(series, services.device.device(), services.device.machine(), conditions)
        newFile(file) { it.write(text.toByteArray()) }
    }

    private fun follow(engine: EngineState) {
        val names = (engine as? EngineState.Ready)?.opened?.bank?.names
        states.update { before ->
            val shown = if (engine is EngineState.Checking) before.copy(series = emptyList(), file = null) else before
            shown.copy(adapters = names.orEmpty(), isReady = names != null)
        }
    }

    override fun onCleared() = stop()

    private companion object {
        const val PICKED = "picked"
    }
}
