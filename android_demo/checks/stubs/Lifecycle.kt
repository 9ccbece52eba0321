package androidx.lifecycle

import android.app.Application
import androidx.lifecycle.viewmodel.CreationExtras
import kotlinx.coroutines.CoroutineScope

abstract class ViewModel {
    protected open fun onCleared(): Unit = TODO()
}

val ViewModel.viewModelScope: CoroutineScope get() = TODO()

class SavedStateHandle {
    operator fun <T> get(key: String): T? = TODO()

    operator fun <T> set(key: String, value: T?): Unit = TODO()
}

fun CreationExtras.createSavedStateHandle(): SavedStateHandle = TODO()

interface ViewModelProvider {
    interface Factory

    open class AndroidViewModelFactory {
        companion object {
            val APPLICATION_KEY: CreationExtras.Key<Application> = TODO()
        }
    }
}
