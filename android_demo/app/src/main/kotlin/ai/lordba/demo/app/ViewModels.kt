package ai.lordba.demo.app

import androidx.lifecycle.ViewModelProvider.AndroidViewModelFactory.Companion.APPLICATION_KEY
import androidx.lifecycle.createSavedStateHandle
import androidx.lifecycle.viewmodel.CreationExtras
import androidx.lifecycle.viewmodel.initializer
import androidx.lifecycle.viewmodel.viewModelFactory

/** Makes every screen's view model. */
val ViewModels =
    viewModelFactory {
        initializer { ModelsViewModel(services().store, services().engine, createSavedStateHandle()) }
        initializer { ChatViewModel(services().engine, createSavedStateHandle()) }
        initializer { FineTuneViewModel(services(), createSavedStateHandle()) }
        initializer { LatencyViewModel(services(), createSavedStateHandle()) }
    }

private fun CreationExtras.services(): Services = (this[APPLICATION_KEY] as DemoApplication).services
