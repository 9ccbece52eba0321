package ai.lordba.demo.app

import ai.lordba.demo.core.BundleListing
import ai.lordba.demo.core.BundleStore
import ai.lordba.demo.core.LordbaError
import androidx.lifecycle.SavedStateHandle
import androidx.lifecycle.ViewModel
import androidx.lifecycle.viewModelScope
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.flow.MutableStateFlow
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.asStateFlow
import kotlinx.coroutines.flow.update
import kotlinx.coroutines.launch

/** The bundles on the phone; [listings] is null until they were looked for. */
data class ModelsState(
    val listings: List<BundleListing>? = null,
    val error: String? = null,
)

class ModelsViewModel(
    private val store: BundleStore,
    private val engine: Engine,
    private val saved: SavedStateHandle,
) : ViewModel() {
    private val states = MutableStateFlow(ModelsState())
    val state: StateFlow<ModelsState> = states.asStateFlow()
    val engineState: StateFlow<EngineState> = engine.state

    init {
        refresh()
        saved.get<String>(OPENED)?.let(engine::open) // the process was killed meanwhile
    }

    fun refresh() {
        viewModelScope.launch(Dispatchers.IO) {
            val listings = store.list()
            states.update { it.copy(listings = listings) }
        }
    }

    fun open(listing: BundleListing) {
        saved[OPENED] = listing.id
        engine.open(listing.id)
    }

    fun delete(listing: BundleListing) {
        viewModelScope.launch(Dispatchers.IO) {
            try {
                engine.release(listing.id) { store.delete(listing) }
                states.update { it.copy(error = null) }
            } catch (error: LordbaError) {
                states.update { it.copy(error = error.message) }
            }
            refresh()
        }
    }

    private companion object {
        const val OPENED = "opened"
    }
}
